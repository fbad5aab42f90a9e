"""Batches stacked for calls of several steps: made ahead by a thread of their own, or where they are asked for."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hpcutils.errors import DataError

Batch: TypeAlias = tuple[NDArray[Any], ...]

# Whose batches are in memory at one time: the call that runs, and two that are made ahead.
CALLS_HELD = 3
# A thread that is told to end has a batch to finish first.
PATIENCE_S = 5.0


class Stacks(Protocol):
    """Where a pass takes its batches from."""

    def is_ready(self) -> bool:
        """Tell whether `take` would return without waiting for data."""

    def take(self, most: int) -> Batch:
        """Return the next batches, at least one and up to `most` of the same call, as arrays `(count, rows, ...)`."""

    def end(self) -> None:
        """Make no more."""


class Ahead:
    """Batches made by a thread, up to two calls ahead. Whoever asks gets all that are there; only where none is he waits.

    A pass thus begins with one batch, and the counts grow as the thread gets ahead. A call's batches lie in one array each, which
    the thread fills: handing them over copies nothing.

    Args:
        batches: Of one pass.
        steps: How many there must be.
        per_call: Batches of a call; counted from the first one.
    """

    def __init__(self, batches: Iterator[Batch], steps: int, per_call: int) -> None:
        self._batches, self._steps, self._per_call = batches, steps, per_call
        self._changed = threading.Condition()
        # The arrays of a call, and a batch's place in them.
        self._made: deque[tuple[Batch, int]] = deque()
        self._error: BaseException | None = None
        self._ended = False
        # A daemon: a rank that fails must not wait for it.
        self.thread = threading.Thread(target=self._run, name="hpcutils-batches", daemon=True)
        self.thread.start()

    def is_ready(self) -> bool:
        """Tell whether a batch is there."""
        return bool(self._made)

    def take(self, most: int) -> Batch:
        """Return what is there, up to `most` batches of one call.

        Raises:
            Exception: What kept the next batch from being made; each time anew.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._made or self._error is not None)
            if not self._made:
                assert self._error is not None
                raise self._error
            stack, first = self._made[0]
            count = 0
            while count < most and self._made and self._made[0][0] is stack:
                self._made.popleft()
                count += 1
            self._changed.notify_all()
        return tuple(array[first : first + count] for array in stack)

    def end(self) -> None:
        """Make no more, and wait a little for the thread to see it."""
        with self._changed:
            self._ended = True
            self._error = self._error or RuntimeError("this pass was ended")
            self._changed.notify_all()
        self.thread.join(PATIENCE_S)

    def _run(self) -> None:
        try:
            number = -1
            stack: Batch = ()
            for number, batch in enumerate(self._batches):
                place = number % self._per_call
                if place == 0:
                    stack = self._new_stack(batch, number)
                if self._per_call > 1:
                    _fill(stack, place, batch)
                if not self._hand_over(stack, place):
                    return
            if number + 1 < self._steps:
                raise DataError(f"the data ended after {number + 1} batches of {self._steps}")
        except BaseException as exc:  # noqa: BLE001 - passed on to who asks
            with self._changed:
                self._error = self._error or exc
                self._changed.notify_all()

    def _new_stack(self, batch: Batch, number: int) -> Batch:
        if self._per_call == 1:
            return tuple(part[np.newaxis] for part in batch)
        count = min(self._per_call, self._steps - number)
        return tuple(np.empty((count, *part.shape), part.dtype) for part in batch)

    def _hand_over(self, stack: Batch, place: int) -> bool:
        """Put a batch where it can be taken and wait until there is room for another; `False` when no more is wanted."""
        with self._changed:
            self._made.append((stack, place))
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._made) < (CALLS_HELD - 1) * self._per_call or self._ended)
            return not self._ended


class Here:
    """Batches made in the thread that takes them, always `most`: for data whose reading is MPI's affair.

    Args:
        batches: Of one pass.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def is_ready(self) -> bool:
        """Nothing ever is."""
        return False

    def take(self, most: int) -> Batch:
        """Make `most` batches: as many on every rank, or one could wait in a step for another that waits for its data."""
        made = list(itertools.islice(self._batches, most))
        if len(made) < most:
            raise DataError(f"the data ended {most - len(made)} batches too early")
        return tuple(np.stack(parts) for parts in zip(*made, strict=True))

    def end(self) -> None:
        """Nothing is being made."""


def _fill(stack: Batch, place: int, batch: Batch) -> None:
    for array, part in zip(stack, batch, strict=True):
        if part.shape != array.shape[1:]:
            raise DataError(f"a batch has an array {part.shape} where the others have {array.shape[1:]}")
        array[place] = part
