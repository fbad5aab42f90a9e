"""A user's own Sequence: what is refused and in which words, workers, epochs, and who ends when."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcutils.data.order import Seat, certificate_of
from hpcutils.errors import DataError, JobFailedError, SpecError
from hpcutils.specs.job import read_job
from hpcutils.train.pipeline import Copy, Recipe, form_of
from hpcutils.train.ranks import Ranks
from hpcutils.train.sequences import BatchOrder, SequenceFeed, numbers_of, open_sequences, plan
from hpcutils.train.workers import InProcess, InThread, Workers, worker_environment
from hpcutils.world import World

PIPELINE = '''
import os, signal, time
import numpy as np

class Batches:
    """20 batches of 4 samples but for the last, of 3; x is the sample's number, y the epoch."""
    epoch = 0

    def __init__(self, fault=None, log=None):
        self.fault, self.log = fault, log

    def __len__(self):
        return 20

    def __getitem__(self, number):
        if number == 7 and self.fault is not None:
            fault(self.fault)
        rows = np.arange(number * 4, min(number * 4 + 4, 79))
        return rows.astype("float32")[:, None], np.full(len(rows), self.epoch)

    def on_epoch_begin(self):
        self.note("begin")

    def on_epoch_end(self):
        self.epoch += 1
        self.note("end")

    def note(self, what):
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {what} {self.epoch}\\n")

def fault(kind):
    if kind == "raise":
        raise ValueError("no luck")
    if kind == "exit":
        os._exit(3)
    if kind == "sleep":
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL)

make = Batches

def environment():
    return [(np.array([sorted(os.environ)]), np.array([os.environ["CUDA_VISIBLE_DEVICES"]]))]

def given(files, name):
    return [(np.array([name]), np.array([files["a.bin"]]))]

def random():
    return [(np.random.random((1, 3)), np.zeros(1))]

def growing():
    batches = Batches()
    type(batches).__len__ = lambda self: 20 + self.epoch
    return batches

def nothing():
    return None

def empty():
    return []

def matrices(path):
    from hpcutils.data.hdf5 import HDF5Matrix
    from hpcutils.data.sequence import MatrixSequence
    return MatrixSequence(HDF5Matrix(path, "x"), HDF5Matrix(path, "y"), 4, shuffle=True, seed=3)

def several():
    def batch(n):
        x = {"left": np.full((n, 2), 1.0, "f4"), "right": (np.full((n, 3), 2.0, ">f4"),)}
        return x, np.zeros(n), np.full((n, 5), 2.0)
    return [batch(2), batch(2), batch(1)]
'''


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    (tmp_path / "pipeline.py").write_text(PIPELINE)
    yield Recipe("pipeline.py:make", str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("hpcutils_user_")]:
        del sys.modules[name]


def feed_of(recipe: Recipe, workers: Workers, batch_size: int = 8) -> SequenceFeed:
    copy = Copy(recipe)
    form = form_of(copy.make(0), recipe.reference)
    last_rows = len(copy.make(copy.batches - 1)[1])
    return SequenceFeed("it", copy, form, BatchOrder(copy.batches, form.rows, last_rows, batch_size, Seat()), workers, "")


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_an_epoch_has_each_sample_once_and_is_the_same_everywhere(recipe, kind, tmp_path):
    recipe = replace(recipe, args={"log": str(tmp_path / "log")})
    copy = Copy(recipe)
    workers = Workers([InProcess({"it": recipe}) if kind == "processes" else InThread({"it": copy}) for _ in range(3)])
    form = form_of(copy.make(0), recipe.reference)
    feed = SequenceFeed("it", copy, form, BatchOrder(20, 4, 3, 8, Seat()), workers, kind)
    # As a run that goes on does: two epochs are over, the third begins in its middle.
    for epoch, first_step in ((2, 4), (3, 0)):
        feed.begin_epoch(epoch, first_step)
        batches = list(feed.batches())
        assert len(batches) == 10 - first_step
        assert {len(part) for batch in batches for part in batch} == {8}
        x, y, weight = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        assert set(y) == {epoch}
        for _ in batches:
            feed.used()
        feed.end_epoch()
    assert sorted(x[weight > 0, 0]) == list(range(79))
    assert feed.certificate == certificate_of(20)
    assert feed.chunks_read(3) == 20
    workers.close()
    notes: dict[str, list[str]] = {}
    for line in (tmp_path / "log").read_text().splitlines():
        process, note = line.split(" ", 1)
        notes.setdefault(process, []).append(note)
    every = ["begin 0", "end 1", "begin 1", "end 2", "begin 2", "end 3", "begin 3", "end 4"]
    assert notes.pop(str(os.getpid())) == every
    assert len(notes) == (3 if kind == "processes" else 0)
    assert all(len(known) >= 5 and known == every[: len(known)] for known in notes.values())


def test_batches_come_in_order_and_few_are_made_ahead(recipe):
    made = []

    class Slow:
        def make(self, which, epoch, number):
            made.append(number)
            time.sleep(0.02 * (number % 3 == 0))
            return number

        def close(self): ...

    workers = Workers([Slow(), Slow()])
    batches = workers.ahead("it", 0, range(30))
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.2)
    assert len(made) <= 3 + 4
    assert list(batches) == list(range(3, 30))
    workers.close()


@pytest.mark.parametrize(
    ("fault", "processes", "said"),
    [
        ("raise", False, "batch 7 of pipeline.py:make: ValueError: no luck"),
        ("raise", True, "batch 7 of pipeline.py:make: ValueError: no luck"),
        ("exit", True, "a worker process ended with code 3 before batch 7 of pipeline.py:make was made"),
        ("kill", True, "a worker process was killed by SIGKILL before batch 7 of pipeline.py:make was made"),
    ],
)
def test_a_worker_that_fails_names_its_batch(recipe, fault, processes, said):
    recipe = replace(recipe, args={"fault": fault})
    workers = Workers([InProcess({"it": recipe}) if processes else InThread({"it": Copy(recipe)})])
    batches = workers.ahead("it", 0, range(20))
    assert [len(next(batches)[0]) for _ in range(7)] == [4] * 7
    started = time.monotonic()
    with pytest.raises(JobFailedError) as caught:
        next(batches)
    assert caught.value.message == said
    assert time.monotonic() - started < 10
    workers.close()


def test_a_worker_process_that_cannot_begin_says_why(recipe):
    recipe = replace(recipe, reference="pipeline.py:gone")
    workers = Workers([InProcess({"it": recipe})])
    with pytest.raises(SpecError, match="has no function 'gone'"):
        next(workers.ahead("it", 0, range(2)))
    workers.close()


def test_worker_processes_see_no_launcher_and_no_gpu(recipe, monkeypatch):
    for name in ("SLURM_PROCID", "PMIX_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "PRTE_LAUNCHED", "HOROVOD_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MY_DATA", "kept")
    workers = Workers([InProcess({"it": replace(recipe, reference="pipeline.py:environment")})])
    (names, devices), = workers.ahead("it", 0, [0])  # fmt: skip
    workers.close()
    assert "MY_DATA" in names
    assert not [name for name in names[0] if name.startswith(("SLURM", "PMI", "OMPI", "PRTE", "HOROVOD"))]
    assert devices == ["-1"]
    assert worker_environment({"SLURMD_NODENAME": "a", "SLURPED": "b"}).keys() & {"SLURMD_NODENAME", "SLURPED"} == {"SLURPED"}


PARENT = """
import sys, time
from hpcutils.train.pipeline import Recipe
from hpcutils.train.workers import InProcess, Workers
recipe = Recipe("pipeline.py:make", sys.argv[1], {"fault": "sleep"})
makers = [InProcess({"it": recipe}) for _ in range(2)]
batches = Workers(makers).ahead("it", 0, range(6, 20))
next(batches)
print(*(maker._process.pid for maker in makers), flush=True)
time.sleep(600)
"""


def test_worker_processes_end_with_a_rank_that_is_killed(recipe):
    rank = subprocess.Popen([sys.executable, "-c", PARENT, recipe.code], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    workers = [int(word) for word in rank.stdout.readline().split()]
    assert len(workers) == 2
    assert all(is_running(worker) for worker in workers), "one of them in the middle of the user's code"
    rank.kill()
    rank.wait()
    end = time.monotonic() + 10
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_function_is_given_arguments_and_files(recipe):
    recipe = replace(recipe, reference="pipeline.py:given", args={"name": "n"}, files={"a.bin": "/staged/a.bin"})
    x, y = Copy(recipe).make(0)
    assert (x[0], y[0]) == ("n", "/staged/a.bin")
    with pytest.raises(SpecError, match=r"data\.args do not fit pipeline.py:given: .*'nam'"):
        Copy(replace(recipe, args={"nam": "n"}))


def test_all_copies_begin_with_the_same_global_generators(recipe):
    recipe = replace(recipe, reference="pipeline.py:random", seed=5)
    first = Copy(recipe).make(0)[0]
    np.random.random()
    np.testing.assert_array_equal(Copy(recipe).make(0)[0], first)


@pytest.mark.parametrize(
    ("function", "error", "said"),
    [
        ("nothing", SpecError, "returned NoneType, which has no number of batches"),
        ("empty", DataError, "the Sequence has 0 batches"),
    ],
)
def test_what_is_no_sequence_is_refused(recipe, function, error, said):
    with pytest.raises(error, match=said):
        Copy(replace(recipe, reference=f"pipeline.py:{function}"))


def test_the_number_of_batches_stays(recipe):
    copy = Copy(replace(recipe, reference="pipeline.py:growing"))
    copy.begin(0)
    with pytest.raises(DataError, match="has 21 batches after on_epoch_end, and had 20"):
        copy.end()


X, Y = np.zeros((4, 2), np.float32), np.zeros(4)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (X, "batch 0 of f is one ndarray"),
        ((X,), "batch 0 of f is a tuple of 1"),
        ((X, Y, Y, Y), "batch 0 of f is a tuple of 4"),
        ((X, {"a": Y}), "batch 0 of f: y is a dict, no array"),
        ((X, np.zeros(3)), "batch 0 of f: y has 3 rows, 4 were expected"),
        ((X, np.ones(())), "batch 0 of f: y is no array with rows"),
        (({"a": X, "b": np.array([None] * 4)}, Y), r"batch 0 of f: x\['b'\] is no array with rows"),
        ((X[:0], Y[:0]), "batch 0 of f has no rows"),
    ],
)
def test_a_first_batch_of_the_wrong_form(batch, said):
    with pytest.raises(DataError, match=said):
        form_of(batch, "f")


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ((X[:3], Y[:3]), "batch 5 of f: x has 3 rows, 4 were expected"),
        ((X, Y, Y), r"batch 5 of f is x float32 \(rows, 2\), y float64 \(rows\), weight float64 \(rows\); batch 0 is x float32"),
        ((X.astype("f8"), Y), r"batch 5 of f is x float64 \(rows, 2\), y float64 \(rows\); batch 0 is x float32 \(rows, 2\)"),
        ((X[:, :1], Y), r"batch 5 of f is x float32 \(rows, 1\)"),
        (({"a": X}, Y), r"batch 5 of f is x\['a'\] float32"),
    ],
)
def test_a_later_batch_of_another_form(batch, said):
    with pytest.raises(DataError, match=said):
        form_of((X, Y), "f").check(batch, 5, 4)


def test_inputs_may_be_nested_and_weights_have_more_axes(recipe):
    recipe = replace(recipe, reference="pipeline.py:several")
    workers = Workers([InThread({"it": Copy(recipe)})])
    feed = feed_of(recipe, workers, 4)
    feed.begin_epoch(0)
    x, y, weight = [feed.pack(batch) for batch in feed.batches()][-1]
    assert (x["left"].shape, x["right"][0].shape, y.shape, weight.shape) == ((4, 2), (4, 3), (4,), (4, 5))
    assert x["right"][0].dtype == np.dtype("=f4")
    # One sample is left: it weighs as much as four, times its own 2.
    np.testing.assert_array_equal(weight[:, 0], [8, 0, 0, 0])
    workers.close()


def test_a_matrix_sequence_shuffles_alike_on_ranks_that_make_different_batches(recipe, tmp_path):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"] = np.arange(61, dtype="f4")
        file["y"] = np.zeros(61, "f4")
    recipe = replace(recipe, reference="pipeline.py:matrices", args={"path": str(tmp_path / "data.h5")})
    feeds, pools = [], []
    for rank in range(3):
        copy = Copy(recipe)
        pools.append(Workers([InThread({"it": copy})]))
        order = BatchOrder(copy.batches, 4, 1, 8, Seat(ranks=3, rank=rank))
        feeds.append(SequenceFeed("it", copy, form_of(copy.make(0), "f"), order, pools[-1], ""))
    orders = []
    for epoch in range(3):
        for feed in feeds:
            feed.begin_epoch(epoch)
        rows = [np.concatenate([x[weight > 0] for x, _, weight in feed.batches()]) for feed in feeds]
        for feed in feeds:
            feed.end_epoch()
        assert sorted(np.concatenate(rows)) == list(range(61)), epoch
        orders.append(tuple(np.concatenate(rows)))
    assert len(set(orders)) == 3
    for pool in pools:
        pool.close()


def test_numbers_from_a_step_on_are_those_of_its_cuts():
    order = BatchOrder(20, 4, 3, 16, Seat(ranks=2, rank=1), seed=3)
    epoch = order.epoch(1)
    expected = [number for step in range(2, order.steps) for number in epoch.cut(step).numbers]
    assert list(numbers_of(order.epoch(1), 2)) == expected


def job_of(tmp_path: Path, **data):
    fields = {
        "name": "j",
        "data": {"sequence": "pipeline.py:make", **data},
        "model": {"function": "model.py:build"},
        "training": {"epochs": 1, "batch_size": 8, "loss": "mse"},
    }
    return read_job(json.dumps(fields))


def test_training_and_held_out_batches_share_the_workers(recipe, tmp_path, caplog):
    job = job_of(tmp_path, validation_sequence="pipeline.py:make", workers=2, use_processes=True)
    with open_sequences(job, tmp_path, Ranks(World()), {}) as (training, held_out):
        assert (training.mode, training.order.shuffle, held_out.order.shuffle) == ("processes", True, False)
        for feed in (training, held_out):
            feed.begin_epoch(0)
            assert len(list(feed.batches())) == 10


def test_what_does_not_fit_the_global_batch_is_said_before_the_first_step(recipe, tmp_path):
    job = job_of(tmp_path)
    job = job.model_copy(update={"training": job.training.model_copy(update={"batch_size": 10})})
    with pytest.raises(DataError) as caught:
        plan(Copy(recipe), job, Ranks(World()), shuffle=True)
    assert "training.batch_size 10 is no multiple of 4" in caught.value.message
    assert caught.value.hint.startswith("make it 8 or 12,")
