"""The daemons: munged and slurmctld on the login host, a slurmd on each node."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import config, kernel
from .errors import SandboxError
from .hosts import Host, enter, run_inside
from .process import Launch, Process, read_record, start

SLURM_CONF = "/etc/slurm/slurm.conf"
READY_TIMEOUT_S = 90.0
POLL_S = 0.1
PORTS = {"slurmctld": 6817, "slurmd": 6818}
UP_STATES = frozenset({"idle", "mixed", "allocated", "completing", "planned", "reserved"})


@dataclass(frozen=True)
class Daemon:
    """One daemon of a sandbox, running or not."""

    host: Host
    role: str

    @property
    def record(self) -> Path:
        return self.host.layout.record(self.host.name, self.role)

    @property
    def output(self) -> Path:
        """What the daemon says before it has its log open, and when it dies."""
        return self.host.layout.log / f"{self.host.name}.{self.role}.out"

    def process(self) -> Process | None:
        return read_record(self.record)


def all_of(layout: config.Layout, shape: config.Shape) -> list[Daemon]:
    """In starting order: who is needed comes first."""
    login = Host(layout, config.LOGIN)
    nodes = [Daemon(Host(layout, name), "slurmd") for name in shape.node_names]
    return [Daemon(login, "munged"), Daemon(login, "slurmctld"), *nodes]


def launch(daemon: Daemon) -> Process:
    """Start a daemon in the foreground of its host: its id is then the one we recorded."""
    layout, host = daemon.host.layout, daemon.host.up()
    if daemon.role == "munged":
        _clear_munge_socket(layout)
    return start(
        Launch(
            argv=_argv(daemon),
            record=daemon.record,
            enter=lambda: enter(host, kernel.HOST_NAMESPACES | kernel.CLONE_NEWPID),
            forks=2,
            output=daemon.output,
        )
    )


def _argv(daemon: Daemon) -> list[str]:
    munge = daemon.host.layout.munge
    # Not /etc/slurm, where every host sees the same file: so that `ps` tells one sandbox's daemons from another's.
    conf = f"{daemon.host.layout.etc}/slurm.conf"
    return {
        "munged": [
            "/usr/sbin/munged",
            "--foreground",
            f"--key-file={munge}/key",
            f"--socket={munge}/socket",
            f"--pid-file={munge}/pid",
            f"--seed-file={munge}/seed",
            f"--log-file={munge}/log",
        ],
        "slurmctld": ["/usr/sbin/slurmctld", "-D", "-f", conf],
        "slurmd": ["/usr/sbin/slurmd", "-D", "-N", daemon.host.name, "-f", conf],
    }[daemon.role]


def make_munge_folder(layout: config.Layout) -> None:
    """The folder and a key of the sandbox's own. munged refuses a key that others can read."""
    layout.munge.mkdir(exist_ok=True)
    key = layout.munge / "key"
    if not key.exists():
        temporary = key.with_name("key.new")
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as file:
            file.write(os.urandom(128))
        temporary.replace(key)


def _clear_munge_socket(layout: config.Layout) -> None:
    """A munged that was killed leaves its socket, and the next one will not replace it."""
    for name in ("socket", "socket.lock", "pid"):
        (layout.munge / name).unlink(missing_ok=True)


def wait_for_munge(daemon: Daemon) -> None:
    socket = daemon.host.layout.munge / "socket"
    _wait(socket.exists, [daemon], "munged does not open its socket")


def node_states(layout: config.Layout) -> dict[str, str]:
    """State of each node as sinfo says it, `idle` or `down*`; empty when slurmctld does not answer."""
    argv = ["sinfo", "--noheader", "--Node", "--format=%N %T"]
    done = _slurm(layout, argv)
    return dict(line.split() for line in done.splitlines()) if done else {}


def _slurm(layout: config.Layout, argv: list[str]) -> str | None:
    """Run a Slurm command on the login host; None when it fails or a daemon it would wait for is not there."""
    login = Host(layout, config.LOGIN)
    process = login.process()
    if process is None or not all(Daemon(login, role).process() for role in ("munged", "slurmctld")):
        return None
    try:
        done = run_inside(process, argv, kernel.HOST_NAMESPACES)
    except subprocess.SubprocessError:  # no answer in time, or the host went down
        return None
    return done.stdout if done.returncode == 0 else None


def is_up(state: str) -> bool:
    """Whether a node in this state runs or can run jobs. `*` after a state means that it does not answer."""
    return state.rstrip("-+") in UP_STATES


def listens(daemon: Daemon) -> bool:
    """Whether a daemon answers on its port. Slurm goes on believing in a killed slurmd for a while; this does not."""
    process = daemon.process()
    if process is None:
        return False
    try:
        lines = Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]
    except OSError:  # it ended just now
        return False
    sockets = [line.split()[1:4] for line in lines]  # local address, remote address, state: 0A is listening
    return any(local.endswith(f":{PORTS[daemon.role]:04X}") and state == "0A" for local, _, state in sockets)


def wait_for_nodes(layout: config.Layout, shape: config.Shape) -> None:
    """Until all nodes can run jobs; those that Slurm set aside (down, drained) are put back into service."""
    daemons = all_of(layout, shape)

    def ready() -> bool:
        if not all(listens(daemon) for daemon in daemons if daemon.role in PORTS):
            return False
        states = node_states(layout)
        aside = [node for node, state in states.items() if state.startswith(("down", "drain", "fail"))]
        if aside:
            _slurm(layout, ["scontrol", "update", f"NodeName={','.join(aside)}", "State=RESUME"])
        return set(shape.node_names) <= states.keys() and all(map(is_up, states.values()))

    _wait(ready, daemons, "the nodes do not become ready")


def _wait(ready: Callable[[], bool], daemons: list[Daemon], complaint: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not ready():
        for daemon in daemons:
            if daemon.process() is None:
                raise SandboxError(f"{daemon.role} on {daemon.host.name} ended: {_last_words(daemon)}", str(daemon.output))
        if time.monotonic() > deadline:
            raise SandboxError(complaint, str(daemons[0].host.layout.log), "read the logs there, then run `up` again")
        time.sleep(POLL_S)


def _last_words(daemon: Daemon) -> str:
    lines = daemon.output.read_text(errors="replace").strip().splitlines() if daemon.output.exists() else []
    return lines[-1] if lines else "it said nothing"
