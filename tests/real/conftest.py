"""The real parts: one sandbox cluster for all tests that submit, as its ordinary user."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANDBOX = ROOT / "slurm" / "sandbox"
USER = "hpcuser"
# Every build here takes the Debian lock while the mirror has it, and what there is when it has not, as `make image` does.
os.environ.setdefault("HPCUTILS_RELOCK", "1")


def require(condition: bool, what: str) -> None:
    """Skip where a part is missing on a person's machine; under CI a missing part is a failure."""
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"missing: {what}")
    pytest.skip(f"missing: {what}")


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, found: Callable[[], str] = lambda: "") -> float:
    """Wait for `condition` and return the seconds that it took; `found` tells what was there instead."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"not within {timeout_s} s: {what}\n{found()}"
        time.sleep(0.1)
    return time.monotonic() - start


@dataclass(frozen=True)
class Cluster:
    """A sandbox cluster and a folder of its ordinary user."""

    name: str
    home: Path

    def sandbox(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(SANDBOX), *words],
            env=os.environ | {"HPCUTILS_SANDBOX_NAME": self.name},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def run(self, *words: str, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as the ordinary user on the login host."""
        return self.sandbox("exec", "--cwd", str(cwd or self.home), "--", *words, check=check)

    def hpcutils(self, *words: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("hpcutils", *words, cwd=cwd, check=check)

    def job(self, name: str = "digits", example: str = "digits", **changes: str) -> Path:
        """Give the user a copy of an example with lines of its train.yaml replaced; return its folder."""
        folder = self.home / f"{name}-{len(list(self.home.iterdir()))}"
        folder.mkdir()
        for file in (*(ROOT / "jobs" / example).glob("*.py"), ROOT / "jobs" / example / "train.yaml"):
            shutil.copy(file, folder)
        text = (folder / "train.yaml").read_text()
        for old, new in changes.items():
            line = next(line for line in text.splitlines() if line.strip().startswith(f"{old}:"))
            text = text.replace(line, line[: line.index(old)] + new)
        (folder / "train.yaml").write_text(text)
        own(folder)
        return folder

    def follow(self, folder: Path, *words: str) -> tuple[Path, dict]:
        """Submit, wait, and return the run directory and its result."""
        done = self.hpcutils("submit", "train.yaml", "--follow", "--json", *words, cwd=folder)
        run = Path(json.loads(done.stdout)["path"])
        return run, json.loads((run / "result.json").read_text())


def own(path: Path) -> None:
    """Give a folder to the ordinary user."""
    entry = pwd.getpwnam(USER)
    for each in (path, *path.rglob("*")):
        os.chown(each, entry.pw_uid, entry.pw_gid)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    require(os.geteuid() == 0, "root, for the sandbox cluster")
    require(shutil.which("slurmctld") is not None, "slurm-wlm")
    # One of this checkout's own: what a killed run left is replaced, and two checkouts do not meet.
    name = f"tests-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:6]}"
    environ = os.environ | {"HPCUTILS_SANDBOX_NAME": name}
    subprocess.run([str(SANDBOX), "up", "--replace", "--nodes", "2", "--gpus", "4"], env=environ, check=True)
    home = Path(pwd.getpwnam(USER).pw_dir) / f"tests-{os.getpid()}"
    home.mkdir()
    own(home)
    yield Cluster(name, home)
    subprocess.run([str(SANDBOX), "down"], env=environ, check=True)
    shutil.rmtree(home)


@pytest.fixture(scope="session")
def image(cluster: Cluster) -> str:
    """The built image; `make test` builds it before."""
    # On the machine itself: the cluster's hosts have no network to build over.
    done = cluster.sandbox("user", "--", "hpcutils", "build", "tf-horovod-cpu", "--json", check=False)
    require(done.returncode == 0, f"the image tf-horovod-cpu (make image): {done.stderr}")
    return "tf-horovod-cpu"
