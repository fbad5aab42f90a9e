"""Running something as the ordinary user, on a host or on this machine, as if called directly."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import resource
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from . import hosts, kernel, users, view
from .daemons import SLURM_CONF
from .errors import SandboxError
from .process import default_signals

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # a shell's exit codes for these


def on_host(host: hosts.Host, checkout: Path, argv: list[str], cwd: str | None, root: bool) -> NoReturn:
    """Run a command on a host; exits as it does."""
    process, user = host.up(), users.account()
    environment = users.environment(checkout, user.pw_dir, os.environ) | {"SLURM_CONF": SLURM_CONF}
    if root:
        superuser = pwd.getpwuid(0)
        environment |= {"USER": superuser.pw_name, "LOGNAME": superuser.pw_name, "HOME": superuser.pw_dir}
    # Signals wait from here until the child is there to pass them to.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    door = hosts.door(process)
    kernel.setns(door, kernel.CLONE_NEWPID)  # only children are members, so a fork is needed
    child = os.fork()
    if child:
        _relay(child)
    with _ending_in_exit():
        kernel.setns(door, kernel.HOST_NAMESPACES)
        if not root:
            users.become(user)
        kernel.die_with_parent(signal.SIGKILL)  # who kills the caller means the command
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _exec(argv, cwd or user.pw_dir, environment)


def on_machine(checkout: Path, argv: list[str], cwd: str | None) -> NoReturn:
    """Run a command on this machine itself; becomes it."""
    users.open_fuse_device()
    user = users.account()
    keep = [checkout, Path(user.pw_dir)]
    if any(view.first_blocked(path, user.pw_uid) for path in keep):
        kernel.unshare(kernel.CLONE_NEWNS)
        view.make_private()
        view.reveal(keep, user.pw_uid)
    environment = users.environment(checkout, user.pw_dir, os.environ, users.KEPT_FOR_BUILDS)
    users.become(user)
    _exec(argv, cwd or user.pw_dir, environment)


def _exec(argv: list[str], cwd: str, environment: Mapping[str, str]) -> NoReturn:
    default_signals()
    try:
        os.chdir(cwd)
    except OSError as error:
        hint = "hosts share /home and the checkout; every other folder needs to be readable by all"
        raise SandboxError(f"{users.USER} cannot enter the folder: {error.strerror}", cwd, hint) from error
    sys.stdout.flush()
    try:
        os.execvpe(argv[0], argv, environment)
    except OSError as error:
        raise CommandError(f"cannot run {argv[0]}: {error.strerror}", environment["PATH"], error.errno) from error


class CommandError(SandboxError):
    """The command could not be started; the exit code is the one a shell gives."""

    def __init__(self, what: str, path: str, code: int | None) -> None:
        super().__init__(what, f"PATH={path}")
        self.exit_code = NOT_FOUND if code == errno.ENOENT else NOT_EXECUTABLE


@contextlib.contextmanager
def _ending_in_exit() -> Iterator[None]:
    """For a forked child: an error is said here and never unwinds into the parent's code."""
    try:
        yield
    except SandboxError as error:
        print(f"sandbox: {error}", file=sys.stderr, flush=True)
        os._exit(getattr(error, "exit_code", 1))
    except BaseException:  # noqa: BLE001 - a process boundary
        traceback.print_exc()
        os._exit(1)


def _relay(child: int) -> NoReturn:
    """Stand in for the child: pass on signals, stop and go on when it does, and end as it ends."""
    while True:
        info = signal.sigwaitinfo(signal.valid_signals())
        if info.si_signo == signal.SIGCHLD:
            _follow(child)
        elif info.si_code <= 0:  # sent by a process; the terminal's own (Ctrl-C) reach the child anyway
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, info.si_signo)


def _follow(child: int) -> None:
    pid, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
    if pid == 0:
        return
    if os.WIFSTOPPED(status):
        os.kill(os.getpid(), signal.SIGSTOP)
    elif os.WIFSIGNALED(status):
        _die_of(os.WTERMSIG(status))
    else:
        os._exit(os.WEXITSTATUS(status))


def _die_of(signum: int) -> NoReturn:
    """End by the signal that ended the child: the caller's shell must see the same cause."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if signum != signal.SIGKILL:
        signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signum])
    os._exit(128 + signum)
