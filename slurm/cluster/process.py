"""Processes we start: recorded before they run, recognised by id and start time, ended through a handle.

No process of the sandbox runs unrecorded, even when `up` is killed at any point: the child waits until its record is
on disk and gives up when its parent is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from .errors import SandboxError

KILL_TIMEOUT_S = 20.0
SYSTEM_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


def boot_id() -> str:
    """Tells this boot of the machine from every other one: process ids start again with each."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is none or only its zombie."""
    try:
        # The command name stands in parentheses and may hold anything, parentheses too: count from the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, started = fields[0], fields[19]
    return None if state in "ZX" else int(started)


@dataclass(frozen=True)
class Process:
    """One process, for ever: an id that was reused later is another process."""

    pid: int
    started: int
    boot: str

    @staticmethod
    def of(pid: int) -> Process:
        started = start_ticks(pid)
        if started is None:
            raise SandboxError("a process ended before it could be recorded", f"process {pid}", "run `up` again")
        return Process(pid, started, boot_id())

    def alive(self) -> bool:
        return self.boot == boot_id() and start_ticks(self.pid) == self.started

    def handle(self) -> int | None:
        """A pidfd, or None when the process is gone. The check comes after the open: then both mean one process."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if self.alive():
            return fd
        os.close(fd)
        return None

    def kill(self) -> None:
        """End the process and wait until it is gone. For the first process of a host: until all of the host is."""
        fd = self.handle()
        if fd is None:
            return
        try:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            if not select.select([fd], [], [], KILL_TIMEOUT_S)[0]:
                raise SandboxError("a process does not end", f"process {self.pid}", "look at /proc/PID/stack and retry")
        finally:
            os.close(fd)


def read_record(path: Path) -> Process | None:
    """The recorded process if it is alive."""
    try:
        process = Process(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return process if process.alive() else None


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Publish a small file whole: readers see the old text or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.chmod(mode)
    temporary.replace(path)


@dataclass(frozen=True)
class Launch:
    """How to start a process.

    Attributes:
        argv: The program (an absolute path first) and its arguments.
        record: Where its identity is kept.
        enter: Called before the forks: joins or makes namespaces.
        prepare: Called in the process itself, just before it is recorded and becomes the program.
        forks: 1, or 2 to make it a child of the namespace's first process, which reaps it: whoever runs this script
            may not (the first process of a container often does not).
        output: Where its stdout and stderr go.
        title: argv[0], what `ps` shows, where the program does not mind.
    """

    argv: list[str]
    record: Path
    enter: Callable[[], None]
    prepare: Callable[[], None] = lambda: None
    forks: int = 1
    output: Path = Path(os.devnull)
    title: str = ""


def start(launch: Launch) -> Process:
    """Start a process, record it, then let it run.

    Raises:
        SandboxError: If its preparation or the start of its program fails.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        ours.close()
        _become(launch, theirs)
    theirs.close()
    os.waitpid(child, 0)
    with ours:
        process = Process.of(int(_report(launch, ours)["pid"]))
        write_text(launch.record, json.dumps(asdict(process)))
        ours.send(b"go")
        _report(launch, ours)  # empty: the socket closed because the program has started
    return process


def _report(launch: Launch, ours: socket.socket) -> dict[str, str]:
    message = json.loads(ours.recv(65536) or b"{}")
    if "error" in message:
        what = f"cannot start {launch.title or launch.argv[0]}: {message['error']}"
        raise SandboxError(what, message["where"] or launch.record.stem, message["hint"])
    return message


def _become(launch: Launch, theirs: socket.socket) -> NoReturn:
    try:
        # Opened before the namespaces change: this /proc counts processes as the machine does.
        machine = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
        os.chdir("/")
        _keep_nothing_open()
        default_signals(range(1, 32))
        launch.enter()
        _descend(launch.forks)
        os.setsid()
        launch.prepare()
        _plug_standard_streams(launch.output)
        theirs.send(json.dumps({"pid": os.readlink("self", dir_fd=machine)}).encode())
        if theirs.recv(16) != b"go":
            os._exit(1)
        os.execve(launch.argv[0], [launch.title or launch.argv[0], *launch.argv[1:]], SYSTEM_ENVIRONMENT)
    except BaseException as error:  # noqa: BLE001 - a process boundary: the parent raises it again
        theirs.send(json.dumps(_described(error)).encode())
    os._exit(1)


def _described(error: BaseException) -> dict[str, str]:
    if isinstance(error, SandboxError):
        return {"error": error.what, "where": error.where, "hint": error.hint}
    return {"error": f"{type(error).__name__}: {error}", "where": "", "hint": ""}


def _descend(forks: int) -> None:
    """Go on as a descendant. All but the last parent wait: an unreaped zombie would keep its namespace from ending."""
    for left in reversed(range(forks)):
        child = os.fork()
        if child:
            if left:
                os.waitpid(child, 0)
            os._exit(0)


def _keep_nothing_open() -> None:
    """Close at exec whatever the caller left open: a daemon holding a pipe's end keeps its reader waiting for ever."""
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        with contextlib.suppress(OSError):  # the listing's own handle is in the list and closed by now
            os.set_inheritable(fd, False)


def _plug_standard_streams(output: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)


def default_signals(numbers: Iterable[int] = (signal.SIGPIPE, signal.SIGXFSZ)) -> None:
    """Restore the kernel's handling of signals; by default of those two that the Python interpreter ignores."""
    for number in set(numbers) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
