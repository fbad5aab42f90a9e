"""Hosts: what makes a process on this machine believe it is alone on another one.

A host is a set of namespaces (network, host name, mounts, IPC, processes) held by its first process, a `sleep` that
reaps. When that process dies the kernel ends all others of the host and with them goes every mount and interface:
nothing of a host can outlive it, whoever or whatever kills it.
"""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import config, kernel, view
from .errors import SandboxError
from .process import SYSTEM_ENVIRONMENT, Launch, Process, read_record, start

COMMAND_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Host:
    """One host of a sandbox, up or not."""

    layout: config.Layout
    name: str

    @property
    def record(self) -> Path:
        return self.layout.record(self.name, "host")

    def process(self) -> Process | None:
        """The host's first process, or None when the host is down."""
        return read_record(self.record)

    def up(self) -> Process:
        process = self.process()
        if process is None:
            raise SandboxError(f"host {self.name} is not up", f"sandbox {self.layout.name}", "run `slurm/sandbox up`")
        return process


def sees(process: Process, folder: Path) -> bool:
    """Whether a host shows the same folder at a path as the machine does now.

    A checkout that was deleted and cloned again at the same path is another folder: the host still binds the old one.
    """
    try:
        inside, outside = Path(f"/proc/{process.pid}/root{folder}").stat(), folder.stat()
    except OSError:
        return False
    return os.path.samestat(inside, outside)


def create(host: Host, checkout: Path, user: pwd.struct_passwd) -> Process:
    """Start a host. It has no network yet."""
    disk = host.layout.disk(host.name)
    for folder in ("scratch", "var-tmp"):
        (disk / folder).mkdir(parents=True, exist_ok=True)
        (disk / folder).chmod(0o1777)
    return start(
        Launch(
            argv=["/usr/bin/sleep", "infinity"],
            title=f"hpcutils-sandbox:{host.layout.name}:{host.name}",
            record=host.record,
            enter=_leave_the_machine,
            prepare=lambda: _furnish(host, checkout, user),
        )
    )


def _leave_the_machine() -> None:
    try:
        kernel.unshare(kernel.HOST_NAMESPACES | kernel.CLONE_NEWPID)
    except PermissionError as error:
        hint = "root here lacks CAP_SYS_ADMIN: give the container --privileged"
        raise SandboxError("not allowed to make namespaces", "unshare(2)", hint) from error


def _furnish(host: Host, checkout: Path, user: pwd.struct_passwd) -> None:
    """Runs as the first process of the new host."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # survives exec: the kernel then reaps for us
    os.umask(0o022)
    socket.sethostname(host.name)
    keep, disk = [checkout, Path(user.pw_dir)], host.layout.disk(host.name)
    view.make_private()
    view.cover_with_tmpfs(Path("/tmp"), 0o1777, keep)
    # Without its own, two clusters with equal host names would share MPI's memory segments: they go by name.
    view.cover_with_tmpfs(Path("/dev/shm"), 0o1777, keep)
    view.cover(Path("/var/tmp"), lambda: kernel.bind(f"{disk}/var-tmp", "/var/tmp"), keep)
    view.reveal(keep, user.pw_uid)
    Path(config.SCRATCH).mkdir()
    kernel.bind(f"{disk}/scratch", config.SCRATCH)
    kernel.bind(str(host.layout.hosts_file), "/etc/hosts")
    kernel.bind(str(host.layout.etc), "/etc/slurm")
    # Last: until here /proc/self/fd had to mean the machine's /proc.
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)


def door(process: Process) -> int:
    """A handle to enter a host by, to be closed. Good from inside too, where process ids mean something else."""
    fd = process.handle()
    if fd is None:
        raise SandboxError("the host went down", f"process {process.pid}", "run `slurm/sandbox up`")
    return fd


def enter(process: Process, flags: int) -> None:
    """Join namespaces of a host. Of CLONE_NEWPID only children forked afterwards are members."""
    fd = door(process)
    try:
        kernel.setns(fd, flags)
    finally:
        os.close(fd)


def run_inside(process: Process, argv: list[str], flags: int, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a short command of ours in namespaces of a host, as root, and return what it said."""
    return subprocess.run(
        argv,
        input=text,
        capture_output=True,
        text=True,
        env=SYSTEM_ENVIRONMENT,
        timeout=COMMAND_TIMEOUT_S,
        preexec_fn=lambda: enter(process, flags),
    )
