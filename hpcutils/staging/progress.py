"""How far a transfer is: a bar on a terminal, a plain line now and then in a job's log; always on stderr."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Protocol, TextIO

BAR_EVERY_S = 0.1
LINE_EVERY_S = 30.0
BAR_CELLS = 24
MIB = 1 << 20


class Progress(Protocol):
    """What a transfer tells: called once a block, so `update` must return at once."""

    def begin(self, done_bytes: int) -> None:
        """Take note that `done_bytes` were there before: they count into no rate."""

    def update(self, done_bytes: int, total_bytes: int | None, also: str = "") -> None:
        """Take note that `done_bytes` of `total_bytes` (None: nobody knows) are there; `also` is told beside the rate."""

    def close(self) -> None:
        """Show the last state; called once, also after a failure."""


class Silent:
    """Shows nothing."""

    def begin(self, done_bytes: int) -> None:
        pass

    def update(self, done_bytes: int, total_bytes: int | None, also: str = "") -> None:
        pass

    def close(self) -> None:
        pass


class _Shown:
    """Keeps the last state, and draws it no more often than `every_s` seconds."""

    every_s = LINE_EVERY_S

    def __init__(self, label: str, stream: TextIO) -> None:
        self.label, self.stream = label, stream
        self.done_bytes = self.begun_bytes = 0
        self.also = ""
        self.total_bytes: int | None = None
        self.started_s = self.drawn_s = time.monotonic()

    def begin(self, done_bytes: int) -> None:
        self.done_bytes = self.begun_bytes = done_bytes

    def update(self, done_bytes: int, total_bytes: int | None, also: str = "") -> None:
        self.done_bytes, self.total_bytes, self.also = done_bytes, total_bytes, also
        now_s = time.monotonic()
        if now_s - self.drawn_s >= self.every_s:
            self.drawn_s = now_s
            self.draw()

    def draw(self) -> None:
        raise NotImplementedError

    def state(self) -> str:
        """Return `12.0 of 34.5 MiB (35%), 6.7 MiB/s, 3 of 4 nodes, 3 s left`."""
        elapsed_s = max(time.monotonic() - self.started_s, 1e-6)
        total = "" if self.total_bytes is None else f" of {self.total_bytes / MIB:.1f}"
        share = f" ({100 * self.done_bytes // self.total_bytes}%)" if self.total_bytes else ""
        rate = (self.done_bytes - self.begun_bytes) / elapsed_s
        left_s = ((self.total_bytes or 0) - self.done_bytes) / rate if rate else 0.0
        left = f", {left_s:.0f} s left" if left_s > 0 else ""
        return f"{self.done_bytes / MIB:.1f}{total} MiB{share}, {rate / MIB:.1f} MiB/s{f', {self.also}' if self.also else ''}{left}"


class Lines(_Shown):
    """A whole line every 30 seconds and one at the end: a log is read later, and a carriage return spoils it."""

    def draw(self) -> None:
        self.stream.write(f"{self.label}: {self.state()}\n")
        self.stream.flush()

    def close(self) -> None:
        self.draw()


class Bar(_Shown):
    """One line that is drawn over itself, cut to the terminal's width."""

    every_s = BAR_EVERY_S

    def draw(self) -> None:
        filled = BAR_CELLS * self.done_bytes // self.total_bytes if self.total_bytes else 0
        cells = "#" * min(filled, BAR_CELLS)
        line = f"{self.label} [{cells:.<{BAR_CELLS}}] {self.state()}"
        width = shutil.get_terminal_size().columns - 1
        self.stream.write(f"\r{line[:width]:<{width}}")
        self.stream.flush()

    def close(self) -> None:
        self.draw()
        self.stream.write("\n")
        self.stream.flush()


def progress_for(label: str, title: str, stream: TextIO | None = None) -> Progress:
    """Write `title` on a line of its own, and return what shows the rest.

    Args:
        label: Short: a file's name.
        title: What begins, and from where.
        stream: `None` is stderr.

    Returns:
        A bar when `stream` is a terminal, plain lines when it is a file or a pipe.
    """
    stream = sys.stderr if stream is None else stream
    stream.write(f"{title}\n")
    return Bar(label, stream) if stream.isatty() else Lines(label, stream)
