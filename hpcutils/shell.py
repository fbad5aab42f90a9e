"""The package's only way to start other programs: argument lists, never a shell; errors of our own tree."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcutils.errors import HpcutilsError, MissingPartError

# How much of a failed program's output an error message shows.
SHOWN_LINES = 30
# How often a caller is asked whether a program is still waited for.
ASK_S = 0.1
# How long a program may take to clean up after SIGTERM before it is killed.
GRACE_S = 15.0


@dataclass(frozen=True)
class Completed:
    """A program that ran to its end."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    input: str | None = None,
    timeout_s: float | None = None,
    give_up: Callable[[], bool] | None = None,
    check: bool = True,
    error: type[HpcutilsError] = HpcutilsError,
    hint: str | None = None,
) -> Completed:
    """Run a program to its end and return what it wrote.

    An exception that arrives meanwhile, also Ctrl-C, ends the program and all it started before it goes on.

    Args:
        argv: Program and arguments, as they are: no shell reads them.
        env: Its whole environment; `None` hands on ours.
        cwd: Its folder.
        input: Text for its standard input; `None` gives it an empty one.
        timeout_s: Seconds until it is ended.
        give_up: Asked ten times a second; when it says yes, the program is ended as if its time were over.
        check: Whether an exit code other than 0 is an error.
        error: Class of that error, and of a timeout.
        hint: Hint of that error.

    Raises:
        MissingPartError: There is no such program.
        error: It failed (with `check`) or took too long.
    """
    with _translating(argv):
        process = subprocess.Popen(
            list(argv), env=env, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    with _ending(process):
        try:
            stdout, stderr = _communicate(process, input or "", timeout_s, give_up)
        except subprocess.TimeoutExpired as exc:
            raise error(f"no answer from '{shlex.join(argv)}' within {exc.timeout:g} s", hint) from exc
    completed = Completed(tuple(argv), process.returncode, stdout, stderr)
    if check and process.returncode != 0:
        raise error(failure(argv, process.returncode, (stderr or stdout).splitlines()), hint)
    return completed


def _communicate(
    process: subprocess.Popen[str], text: str, timeout_s: float | None, give_up: Callable[[], bool] | None
) -> tuple[str, str]:
    if give_up is None:
        return process.communicate(text, timeout=timeout_s)
    started = time.monotonic()
    while True:
        try:
            return process.communicate(text, timeout=ASK_S)
        except subprocess.TimeoutExpired as exc:
            text, waited_s = "", time.monotonic() - started  # what was begun to be written is not handed over twice
            if give_up():
                raise subprocess.TimeoutExpired(exc.cmd, waited_s) from exc
            if timeout_s is not None and waited_s > timeout_s:
                raise subprocess.TimeoutExpired(exc.cmd, timeout_s) from exc


def stream(
    argv: Sequence[str],
    on_line: Callable[[str], None],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    error: type[HpcutilsError] = HpcutilsError,
    hint: str | None = None,
    shown: Callable[[str], str] = str,
) -> None:
    """Run a long program and hand over each line of its output (both streams) as it comes.

    An exception that arrives meanwhile, also Ctrl-C, ends the program and all it started before it goes on.

    Args:
        argv: Program and arguments.
        on_line: Called with each line, without its end.
        env: Its whole environment; `None` hands on ours.
        cwd: Its folder.
        error: Class of the error when it fails; the message has the last lines.
        hint: Hint of that error.
        shown: Applied to each line of that message (to leave out what must not be shown).

    Raises:
        MissingPartError: There is no such program.
        error: It ended with another code than 0.
    """
    last: deque[str] = deque(maxlen=SHOWN_LINES)
    with _translating(argv):
        process = subprocess.Popen(
            list(argv), env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    with _ending(process):
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line.rstrip("\n"))
            on_line(last[-1])
        code = process.wait()
    if code != 0:
        raise error(failure(argv, code, [shown(line) for line in last]), hint)


def start(argv: Sequence[str], *, env: Mapping[str, str], keep_open: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a program that lives beside this one, of our process group, and return it at once.

    Args:
        argv: Program and arguments.
        env: Its whole environment.
        keep_open: Numbers of open files that it takes over; no others.

    Raises:
        MissingPartError: There is no such program.
    """
    with _translating(argv):
        return subprocess.Popen(list(argv), env=env, stdin=subprocess.DEVNULL, pass_fds=tuple(keep_open))


def failure(argv: Sequence[str], code: int, lines: Sequence[str]) -> str:
    """Return the message of a failed program: its command, how it ended, its last lines."""
    ended = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    return "\n".join([f"'{shlex.join(argv)}' {ended}", *(f"  {line}" for line in lines[-SHOWN_LINES:])])


@contextlib.contextmanager
def _translating(argv: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as exc:
        # A working folder that is gone raises the same error; the name in it tells the two apart.
        if exc.filename != argv[0]:
            raise
        raise MissingPartError(f"{argv[0]}: no such program", "install it, or add its folder to PATH") from exc
    except PermissionError as exc:
        raise MissingPartError(f"{argv[0]}: may not be started: {exc.strerror}") from exc


@contextlib.contextmanager
def _ending(process: subprocess.Popen[str]) -> Iterator[None]:
    """End the whole process group when the block is left before the program has ended.

    SIGTERM first: Apptainer, killed outright, leaves the process behind that shows the image's files, and that holds the image's
    disk space even when the file is gone.
    """
    try:
        yield
    finally:
        if process.poll() is None:
            _signal_group(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            _signal_group(process, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                # Unwritten input to a program that is gone is no loss.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    # The group's leader is the program itself (start_new_session), so its number is the group's.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
