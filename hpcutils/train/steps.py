"""Several steps a call: what Keras would do once a step is done once for many.

Keras calls its compiled function for every step, takes the batch out of an iterator for it, and unpacks what it returned: a third
of the time of a step of 4 ms (measured with jobs/digits, batch 32). Here a call runs up to `STEPS_PER_CALL` steps inside of one
TensorFlow function, over batches that are stacked in one array; the next call's are made meanwhile, by one thread.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

STEPS_PER_CALL = 16
# Of one call's batches; larger ones take so long that a call for each costs nothing.
STACK_BYTES = 8 << 20

Batch: TypeAlias = tuple[NDArray[Any], ...]


class Batches(Protocol):
    """What a pass runs over."""

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of the pass that has begun, arrays `(rows, ...)`."""

    def example(self) -> Batch:
        """Return a batch of the same shapes and types."""


class StepRunner:
    """Stands in for a Keras model's `train_function` or `test_function`.

    Args:
        step: The compiled model's `train_step` or `test_step`.
        batches: Its data. What Keras hands in with each call is not looked at.
        steps: Steps of one pass over the data.
        per_call: From `steps_per_call`; the model's `steps_per_execution`.
        before_last: Called before the last step of each pass, when all others are done.
        after: Called after each call with its number of steps.

    Attributes:
        done: Steps of this pass, those before its first included.
        called: Steps of the last call.
        wait_s: Seconds of this pass in which no step ran since its batch was not ready.
    """

    def __init__(
        self,
        step: Callable[[Any], Any],
        batches: Batches,
        steps: int,
        per_call: int,
        before_last: Callable[[], None],
        after: Callable[[int], None],
    ) -> None:
        self._batches, self._steps, self._per_call = batches, steps, per_call
        self._before_last, self._after = before_last, after
        step = tf.autograph.experimental.do_not_convert(step)

        signature = [tf.TensorSpec((None, *array.shape), array.dtype) for array in batches.example()]

        @tf.function(input_signature=signature)  # type: ignore[untyped-decorator]
        def run(*stacks: Any) -> None:
            for number in tf.range(tf.shape(stacks[0])[0]):
                step(tuple(stack[number] for stack in stacks))

        self._run = run
        self.done, self.called, self.wait_s = 0, 0, 0.0

    def begin(self, first_step: int = 0) -> None:
        """Start a pass, with its first step or a later one; its data has begun."""
        self.done, self.wait_s = first_step, 0.0
        self._counts = counts_of_calls(self._steps - first_step, self._per_call)
        self._ahead = Ahead(stacked(self._batches.batches(), [count for call in self._counts for count in call]))

    def __call__(self, iterator: Any) -> dict[str, Any]:
        """Run the next steps. The metrics stay in the model: who wants them asks once a pass."""
        call = self._counts.pop(0)
        for count in call:
            if self.done + count == self._steps:
                self._before_last()
            asked = time.perf_counter()
            stacks = next(self._ahead)
            self.wait_s += time.perf_counter() - asked
            self._run(*stacks)
            self.done += count
        self.called = sum(call)
        self._after(self.called)
        return {}


def steps_per_call(*passes: Batches) -> int:
    """Return how many steps a call takes: one number for all passes, as Keras has one."""
    largest = max(sum(array.nbytes for array in batches.example()) for batches in passes)
    return max(1, min(STEPS_PER_CALL, STACK_BYTES // largest))


def counts_of_calls(steps: int, per_call: int) -> list[list[int]]:
    """Return, for each call, how many steps run at once: all of them, but for the very last step, which runs alone."""
    calls = [[min(per_call, steps - start)] for start in range(0, steps, per_call)]
    *others, last = calls
    return [*others, [count for count in (last[0] - 1, 1) if count]]


def stacked(batches: Iterator[Batch], counts: list[int]) -> Iterator[Batch]:
    """Yield so many batches at a time as one, arrays `(count, rows, ...)`."""
    for count in counts:
        parts = zip(*itertools.islice(batches, count), strict=True)
        yield tuple(part[0][np.newaxis] if count == 1 else np.stack(part) for part in parts)


class Ahead(Iterator[Batch]):
    """An iterator whose next item is made in the background, by a thread of its own; an error comes where its item would."""

    def __init__(self, items: Iterator[Batch]) -> None:
        self._ready: queue.Queue[tuple[Batch | None, BaseException | None]] = queue.Queue(1)
        # A daemon: a rank that fails must not wait for it.
        threading.Thread(target=self._make, args=(items,), name="hpcutils-batches", daemon=True).start()

    def _make(self, items: Iterator[Batch]) -> None:
        try:
            for item in items:
                self._ready.put((item, None))
            self._ready.put((None, StopIteration()))
        except BaseException as exc:  # noqa: BLE001 - passed on to who asks
            self._ready.put((None, exc))

    def __next__(self) -> Batch:
        item, error = self._ready.get()
        if item is None:
            raise error or StopIteration
        return item
