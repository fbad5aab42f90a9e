"""Several steps a call: what runs when, over which batches, and what becomes of errors."""

import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from hpcutils.errors import DataError
from hpcutils.train import steps as steps_module
from hpcutils.train.ahead import Ahead, Here
from hpcutils.train.steps import StepRunner, most_at_once, steps_per_call


class Numbers:
    """Batches of two arrays that say which they are."""

    needs_main_thread = False

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


def test_the_last_step_of_a_pass_runs_alone():
    assert most_at_once(0, 16, 32) == 16
    assert most_at_once(5, 16, 32) == 11
    assert most_at_once(16, 32, 32) == 15
    assert most_at_once(31, 32, 32) == 1
    assert most_at_once(0, 1, 1) == 1


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
    assert runner.done in (4, 5)
    with pytest.raises(OSError, match="batch 5 cannot be read"):
        runner(None)


class Gated(Numbers):
    """Batches of which each needs a permit."""

    def __init__(self, steps, permits=0):
        super().__init__(steps)
        self.permits = threading.Semaphore(permits)

    def batches(self):
        for batch in super().batches():
            self.permits.acquire()
            yield batch


def wait_for(condition):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 20
        time.sleep(0.001)


def values(stacks):
    return stacks[0][:, 0, 0].tolist()


def test_the_first_batch_runs_before_the_second_is_made():
    numbers = Gated(40, permits=1)
    ahead = Ahead(numbers.batches(), 40, 16)
    assert values(ahead.take(16)) == [0]
    assert not ahead.is_ready()
    for _ in range(3):
        numbers.permits.release()
    wait_for(lambda: len(ahead._made) == 3)
    assert ahead.is_ready()
    assert values(ahead.take(15)) == [1, 2, 3]
    for _ in range(36):
        numbers.permits.release()
    wait_for(lambda: len(ahead._made) == 32)
    assert values(ahead.take(12)) == list(range(4, 16)), "no further than the call"
    assert values(ahead.take(5)) == list(range(16, 21)), "no more than asked for"


def test_what_is_made_ahead_is_no_more_than_two_calls():
    numbers = Gated(40, permits=40)
    ahead = Ahead(numbers.batches(), 40, 4)
    wait_for(lambda: len(ahead._made) == 8)
    time.sleep(0.05)
    assert len(ahead._made) == 8
    assert numbers.permits._value == 40 - 8
    ahead.end()


@pytest.mark.parametrize("per_call", [1, 16])
def test_steps_do_not_wait_for_data_that_is_cheaper(per_call):
    """Data of 20 ms and steps of 30 ms, asleep both: only the first batch of a pass can be waited for."""
    steps, data_s, step_s = 100, 0.02, 0.03

    class Slow(Numbers):
        def batches(self):
            for batch in super().batches():
                time.sleep(data_s)
                yield batch

    def step(batch):
        tf.py_function(lambda: time.sleep(step_s), [], [])

    counts: list = []
    runner = StepRunner(step, Slow(steps), steps, per_call, lambda: None, lambda count: counts.append(count))
    runner.begin()
    started = time.perf_counter()
    while runner.done < steps:
        runner(None)
    seconds = time.perf_counter() - started
    assert counts == [per_call] * (steps // per_call) + [steps % per_call] * (steps % per_call > 0)
    assert runner.wait_s < 0.02 * seconds


def test_what_a_device_still_computes_is_no_waiting_for_data(monkeypatch):
    """A device that runs behind its calls is waited for first, and only where no batch is ready."""
    numbers, synced = Gated(4), []

    def sync():
        synced.append(runner.done)
        time.sleep(0.3)
        numbers.permits.release()

    runner = runner_of(numbers, 4, [])
    monkeypatch.setattr(tf.test.experimental, "sync_devices", sync)
    runner.begin()
    runner(None)
    assert synced == [0, 1, 2, 3]
    assert runner.wait_s < 0.6
    runner.begin()
    for _ in range(4):
        numbers.permits.release()
    wait_for(lambda: len(runner._stacks._made) == 4)
    synced.clear()
    runner(None)
    assert synced == []


def test_data_that_needs_the_main_thread_is_made_in_it():
    threads: list = []

    class Noted(Numbers):
        needs_main_thread = True

        def batches(self):
            for batch in super().batches():
                threads.append(threading.current_thread())
                yield batch

    seen: list = []
    runner = runner_of(Noted(9), 4, seen)
    runner.begin()
    assert threads == []
    for _ in range(3):
        runner(None)
    assert [item[0] for item in seen if isinstance(item, tuple)] == list(range(9))
    assert set(threads) == {threading.main_thread()}
    assert runner.wait_s > 0


def test_every_rank_makes_as_many_at_once_where_ranks_wait_for_each_other():
    here = Here(Numbers(5).batches())
    assert not here.is_ready()
    assert values(here.take(3)) == [0, 1, 2]
    with pytest.raises(DataError, match="ended 1 batches too early"):
        here.take(3)


def test_an_error_stays_whoever_asks_again():
    ahead = Ahead(Numbers(8, fault_at=1).batches(), 8, 4)
    assert values(ahead.take(4)) == [0]
    for _ in range(3):
        with pytest.raises(OSError, match="batch 1 cannot be read"):
            ahead.take(4)
    assert not ahead.thread.is_alive()


def test_data_that_ends_early_is_an_error():
    ahead = Ahead(Numbers(3).batches(), 5, 2)
    assert [values(ahead.take(1)) for _ in range(3)] == [[0], [1], [2]]
    with pytest.raises(DataError, match="ended after 3 batches of 5"):
        ahead.take(1)


def test_a_batch_of_another_shape_is_an_error():
    batches = [(np.zeros((3, 2)),), (np.zeros((1, 2)),)]
    ahead = Ahead(iter(batches), 2, 2)
    ahead.take(1)
    with pytest.raises(DataError, match=r"an array \(1, 2\) where the others have \(3, 2\)"):
        ahead.take(1)


def test_the_thread_of_a_pass_that_was_given_up_ends():
    before = set(threading.enumerate())
    runner = runner_of(Gated(40, permits=40), 4, [])
    runner.begin()
    runner(None)
    first = runner._stacks
    wait_for(lambda: len(first._made) == 8)
    runner.begin()
    assert not first.thread.is_alive()
    second = runner._stacks
    runner.end()
    assert not second.thread.is_alive()
    assert {thread for thread in threading.enumerate() if thread.name == "hpcutils-batches"} <= before
    with pytest.raises(RuntimeError, match="was ended"):
        while True:
            second.take(4)
