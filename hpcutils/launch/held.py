"""Ctrl-C and its kin while something must not be left half done: they are noted, and acted on when it is safe."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from hpcutils.errors import InterruptError

# SIGHUP comes when a terminal or its connection is closed.
HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Hold:
    """What arrived meanwhile."""

    def __init__(self) -> None:
        self.count = 0
        self._since = 0.0

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal."""
        self.count += 1
        if self.count == 1:
            self._since = time.monotonic()

    def is_pressing(self, grace_s: float) -> bool:
        """Whether a signal came twice, or `grace_s` seconds ago."""
        return self.count > 1 or (self.count == 1 and time.monotonic() - self._since > grace_s)

    def check(self) -> None:
        """Raise what the signal would have raised.

        Raises:
            InterruptError: There was one.
        """
        if self.count:
            raise InterruptError("interrupted")


@contextlib.contextmanager
def held() -> Iterator[Hold]:
    """Hold Ctrl-C, SIGTERM and SIGHUP back in this block, which asks the yielded `Hold` for them.

    A mask would be inherited by the programs that are started, and would not let a hanging one be given up. Only the main thread
    may set handlers: in any other, nothing is held.
    """
    hold = Hold()
    if threading.current_thread() is not threading.main_thread():
        yield hold
        return
    # What is ignored (nohup, a shell's background) stays ignored.
    numbers = [number for number in HELD if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hold.note) for number in numbers}
    try:
        yield hold
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
