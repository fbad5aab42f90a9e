"""Several steps a call: what Keras would do once a step is done once for many.

Keras calls its compiled function for every step, takes the batch out of an iterator for it, and unpacks what it returned: a third
of the time of a step of 4 ms (measured with jobs/digits, batch 32). Here a call runs up to `STEPS_PER_CALL` steps inside of one
TensorFlow function, over batches that are stacked in one array; the next ones are made meanwhile, by one thread. What is ready
runs: a call waits only where there is no batch at all, never for a whole stack.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import tensorflow as tf

from hpcutils.train.ahead import CALLS_HELD, Ahead, Batch, Here, Stacks

STEPS_PER_CALL = 16
# Of one call's batches; larger ones take so long that a call for each costs nothing.
STACK_BYTES = 8 << 20


class Batches(Protocol):
    """What a pass runs over.

    Attributes:
        needs_main_thread: Whether batches must be made in the thread that runs the steps.
    """

    needs_main_thread: bool

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of the pass that has begun, arrays `(rows, ...)`."""

    def example(self) -> Batch:
        """Return a batch of the same shapes and types."""

    def pack(self, parts: tuple[Any, ...]) -> Any:
        """Return the parts of a batch, here tensors, as the step takes them."""


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
        wait_s: Seconds of this pass in which no step ran since its batch was not ready. Steps that a device runs behind their calls
            are waited for first.
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
                step(batches.pack(tuple(stack[number] for stack in stacks)))

        self._run = run
        self._is_traced = False
        self.done, self.called, self.wait_s = 0, 0, 0.0
        self._stacks: Stacks | None = None

    def begin(self, first_step: int = 0) -> None:
        """Start a pass, with its first step or a later one; its data has begun."""
        self.end()
        self.done, self.wait_s = first_step, 0.0
        batches, steps = self._batches.batches(), self._steps - first_step
        self._stacks = Here(batches) if self._batches.needs_main_thread else Ahead(batches, steps, self._per_call)

    def end(self) -> None:
        """Give a pass up, if there is one: its batches are made no more."""
        if self._stacks is not None:
            self._stacks.end()
            self._stacks = None

    def __call__(self, iterator: Any) -> dict[str, Any]:
        """Run the next steps. The metrics stay in the model: who wants them asks once a pass."""
        if not self._is_traced:
            # Takes longer than the first batches do, which are made meanwhile.
            self._run.get_concrete_function()
            self._is_traced = True
        first = self.done
        stop = min(first + self._per_call, self._steps)
        while self.done < stop:
            if self.done + 1 == self._steps:
                self._before_last()
            stacks = self._take(most_at_once(self.done, stop, self._steps))
            self._run(*stacks)
            self.done += len(stacks[0])
        self.called = stop - first
        self._after(self.called)
        return {}

    def _take(self, most: int) -> Batch:
        """Return the next batches and add to `wait_s` how long they were waited for."""
        assert self._stacks is not None
        if not self._stacks.is_ready():
            # A GPU may still run the steps of calls that have returned: that is no waiting for data.
            tf.test.experimental.sync_devices()
        asked = time.perf_counter()
        stacks = self._stacks.take(most)
        self.wait_s += time.perf_counter() - asked
        return stacks


def steps_per_call(*passes: Batches) -> int:
    """Return how many steps a call takes: one number for all passes, as Keras has one."""
    return max(1, min(STEPS_PER_CALL, STACK_BYTES // max(map(batch_bytes, passes))))


def batch_bytes(batches: Batches) -> int:
    """Return the size of a batch."""
    return sum(array.nbytes for array in batches.example())


def held_bytes(*passes: Batches) -> int:
    """Return what the batches of passes that are under way at one time take, those made ahead included."""
    return CALLS_HELD * steps_per_call(*passes) * sum(map(batch_bytes, passes))


def most_at_once(done: int, stop: int, steps: int) -> int:
    """Return how many steps may run together: those before `stop`, but for the very last step of a pass, which runs alone."""
    return max(1, stop - done - (stop == steps))
