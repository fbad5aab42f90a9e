"""Several steps a call: what runs when, over which batches, and what becomes of errors."""

import numpy as np
import pytest
import tensorflow as tf

from hpcutils.train import steps as steps_module
from hpcutils.train.steps import Ahead, StepRunner, counts_of_calls, stacked, steps_per_call


class Numbers:
    """Batches of two arrays that say which they are."""

    def __init__(self, steps, fault_at=None):
        self.steps, self.fault_at = steps, fault_at

    def example(self):
        return np.zeros((3, 2), np.float32), np.zeros(3, np.float32)

    def pack(self, parts):
        return parts

    def batches(self):
        for step in range(self.steps):
            if step == self.fault_at:
                raise OSError(f"batch {step} cannot be read")
            yield np.full((3, 2), step, np.float32), np.full(3, -step, np.float32)


def runner_of(numbers, per_call, seen):
    def step(batch):
        x, y = batch
        assert (x.shape, y.shape) == ((3, 2), (3,))
        tf.py_function(lambda x, y: seen.append((float(x[2, 1]), float(y[2]))), [x, y], [])

    return StepRunner(
        step, numbers, numbers.steps, per_call, lambda: seen.append("before last"), lambda n: seen.append(f"{n} done")
    )


@pytest.mark.parametrize(("steps", "per_call"), [(1, 1), (1, 4), (4, 4), (5, 4), (7, 3), (8, 4), (9, 1)])
def test_every_step_runs_once_and_in_order(steps, per_call):
    seen: list = []
    runner = runner_of(Numbers(steps), per_call, seen)
    for _ in range(2):
        seen.clear()
        runner.begin()
        # As Keras counts them.
        for _ in range(0, steps, per_call):
            assert runner(None) == {}
        assert runner.done == steps
        assert [item for item in seen if isinstance(item, tuple)] == [(step, -step) for step in range(steps)]
        assert seen[-3:] == ["before last", (steps - 1, 1 - steps), f"{(steps - 1) % per_call + 1} done"]


def test_a_pass_may_begin_in_its_middle():
    seen: list = []
    runner = runner_of(Numbers(5), 4, seen)
    runner.begin(3)  # the batches that are left are the feed's affair: here they begin at 0
    runner(None)
    assert seen == [(0, 0), "before last", (1, -1), "2 done"]
    assert runner.done == 5


def test_calls_take_what_keras_counts():
    assert counts_of_calls(23, 16) == [[16], [6, 1]]
    assert counts_of_calls(32, 16) == [[16], [15, 1]]
    assert counts_of_calls(17, 16) == [[16], [1]]
    assert counts_of_calls(1, 16) == [[1]]


def test_large_batches_are_not_stacked(monkeypatch):
    assert steps_per_call(Numbers(1)) == steps_module.STEPS_PER_CALL
    monkeypatch.setattr(steps_module, "STACK_BYTES", 80)
    assert steps_per_call(Numbers(1)) == 2
    monkeypatch.setattr(steps_module, "STACK_BYTES", 10)
    assert steps_per_call(Numbers(1)) == 1


def test_an_error_comes_as_it_is_where_its_batch_would():
    seen: list = []
    runner = runner_of(Numbers(8, fault_at=5), 4, seen)
    runner.begin()
    runner(None)
    with pytest.raises(OSError, match="batch 5 cannot be read"):
        runner(None)
    assert runner.done == 4


def test_what_is_made_ahead_ends_as_the_iterator_does():
    assert [stack[1][:, 0].tolist() for stack in Ahead(stacked(Numbers(5).batches(), [2, 2, 1]))] == [[0, -1], [-2, -3], [-4]]
