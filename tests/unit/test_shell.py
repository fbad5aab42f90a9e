"""Starting programs: what comes back, which error, and that nothing is left running."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcutils.errors import ImageError, MissingPartError
from hpcutils.shell import run, stream


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_both_outputs_and_the_code_come_back() -> None:
    done = run(python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"), check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_input_and_environment_are_exactly_those_given(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.stdin.read(), sorted(set(os.environ) - {'LC_CTYPE'}), os.getcwd())"
    done = run(python(code), input="hello", env={"A": "1"}, cwd=tmp_path)
    assert done.stdout == f"hello ['A'] {tmp_path}\n"


def test_no_shell_reads_the_arguments() -> None:
    assert run(["echo", "$HOME `id` ; true"]).stdout == "$HOME `id` ; true\n"


def test_a_failure_has_the_callers_class_the_command_and_the_last_words() -> None:
    with pytest.raises(ImageError) as caught:
        run(python("import sys; print('disk full', file=sys.stderr); sys.exit(7)"), error=ImageError, hint="make room")
    assert "ended with code 7" in caught.value.message and "disk full" in caught.value.message
    assert caught.value.hint == "make room"


def test_an_end_by_a_signal_is_told() -> None:
    with pytest.raises(ImageError, match="ended by signal 9"):
        run(python("import os; os.kill(os.getpid(), 9)"), error=ImageError)


def test_a_timeout_has_the_callers_class() -> None:
    with pytest.raises(ImageError, match=r"no answer .* within 0\.2 s"):
        run(["sleep", "60"], timeout_s=0.2, error=ImageError)


def test_a_program_that_is_not_there_is_a_missing_part() -> None:
    for start in (lambda: run(["no-such-program"]), lambda: stream(["no-such-program"], print)):
        with pytest.raises(MissingPartError, match="no-such-program: no such program"):
            start()


def test_a_folder_that_is_not_there_is_not_taken_for_a_missing_program(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run(["true"], cwd=tmp_path / "gone")


def test_lines_come_while_the_program_runs() -> None:
    seen: list[tuple[str, float]] = []
    code = "import sys, time; print('a', flush=True); time.sleep(0.5); print('b', file=sys.stderr, flush=True)"
    stream(python(code), lambda line: seen.append((line, time.monotonic())))
    assert [line for line, _ in seen] == ["a", "b"]
    assert seen[1][1] - seen[0][1] > 0.3


def test_a_stream_that_fails_shows_its_last_lines_as_the_caller_wants_them() -> None:
    with pytest.raises(ImageError) as caught:
        stream(python("print('secret'); raise SystemExit(1)"), lambda line: None, error=ImageError, shown=lambda line: "***")
    assert "***" in caught.value.message and "  secret" not in caught.value.message


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def test_an_exception_ends_the_program_and_what_it_started() -> None:
    code = "import subprocess, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    pids: list[int] = []

    def stop(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stream(python(code), stop)
    assert time.monotonic() - started < 10
    deadline = time.monotonic() + 5
    while alive(pids[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pids[0])


def test_a_timeout_lets_the_program_clean_up(tmp_path: Path) -> None:
    code = f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(tmp_path / "clean")!r}).touch(), sys.exit(0)))
time.sleep(60)
"""
    with pytest.raises(ImageError):
        run(python(code), timeout_s=1.5, error=ImageError)
    assert (tmp_path / "clean").exists()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """A shell starts what it puts into the background with SIGINT ignored, and that is inherited."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_reaches_a_program_in_a_group_of_its_own(ctrl_c: None) -> None:
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stream(["sleep", "60"], print)
    timer.join()
    assert time.monotonic() - started < 10
