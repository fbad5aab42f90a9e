"""Sandbox clusters for tests: each under a name of its own, so that they disturb neither each other nor anybody's.

What a killed run of these tests left is taken down by the next one: a name holds the id of the run that made it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
ROOT = Path("/var/lib/hpcutils-sandbox")
NAMES = (f"selftest-{os.getpid()}-{n}" for n in itertools.count())
KINDS = ("net", "uts", "mnt", "ipc", "pid")


def require_slurm() -> None:
    """Skip where no sandbox can be; under CI that is a failure."""
    missing = "root" if os.geteuid() else "" if shutil.which("slurmctld", path="/usr/sbin") else "slurm-wlm"
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"missing: {missing}")


def take_down_leftovers() -> None:
    for left in ROOT.glob("selftest-*-*"):
        if not Path(f"/proc/{left.name.split('-')[1]}").exists():
            Sandbox(left.name).call("down", check=True)


class Sandbox:
    """A sandbox by name, driven through the script of a checkout."""

    def __init__(self, name: str, checkout: Path = CHECKOUT) -> None:
        self.name, self.script, self.root = name, checkout / "slurm/sandbox", ROOT / name

    def argv(self, command: str, *arguments: str) -> list[str]:
        return [str(self.script), command, "--name", self.name, *arguments]

    def call(self, command: str, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
        options = {"capture_output": True, "text": True, "timeout": 120, **options}
        return subprocess.run(self.argv(command, *arguments), **options)

    def up(self, *arguments: str) -> str:
        done = self.call("up", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def status(self) -> dict:
        return json.loads(self.call("status", "--json").stdout)

    def run(self, command: str, *arguments: str) -> str:
        """Run shell text on the login host (or where `arguments` say); its stdout."""
        done = self.call("exec", *arguments, "--", "bash", "-c", command)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def process(self, name: str) -> int:
        status = self.status()
        return {**status["hosts"], **status["daemons"]}[name]


@contextlib.contextmanager
def sandbox(*arguments: str, checkout: Path = CHECKOUT) -> Iterator[Sandbox]:
    box = Sandbox(next(NAMES), checkout)
    try:
        if arguments:
            box.up(*arguments)
        yield box
    finally:
        done = box.call("down")
        assert done.returncode == 0, done.stderr


def wait_until(true: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def state(pid: int) -> str:
    """A process's state as one letter: S sleeps, T is stopped, Z is dead and not reaped."""
    return re.search(r"State:\s+(\w)", Path(f"/proc/{pid}/status").read_text())[1]


def namespaces_in_use() -> set[str]:
    """Namespaces of all living processes, as the kernel names them: `net:[4026532181]`."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # A zombie still names namespaces. It waits for the machine's first process, which may take its time.
            if state(int(process.name)) != "Z":
                found |= {str(link.readlink()) for link in (process / "ns").iterdir()}
    return found


def namespaces_of(pid: int) -> set[str]:
    return {str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for kind in KINDS}


def members_of(pid: int) -> set[int]:
    """Processes of the host whose first process is given."""
    wanted, found = os.stat(f"/proc/{pid}/ns/net").st_ino, set()  # noqa: PTH116 - follows a kernel link
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "ns/net").stat().st_ino == wanted:
                found.add(int(process.name))
    return found


def listening_ports() -> set[int]:
    """TCP ports that something listens on in the machine's own network namespace."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return {int(fields[1].rpartition(":")[2], 16) for fields in map(str.split, lines) if fields[3] == "0A"}
