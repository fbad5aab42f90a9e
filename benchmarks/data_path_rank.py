"""One MPI rank of `bench_data_path`: read shuffled epochs in windows, or only do the parts of that work; one JSON line on rank 0.

    mpirun -n 2 python -m benchmarks.data_path_rank WHAT FILE DATASET BATCH EPOCHS [SAMPLES]

WHAT is `windows`, `steps` (training steps over the windows of the first SAMPLES samples, as a job runs them), `inflate` (the
chunks' bytes, nothing else), `decode` (the same and unshuffle) or `copy` (rows in memory, twice).
"""

from __future__ import annotations

import json
import os
import sys
import time

import h5py
import numpy as np
from mpi4py import MPI

from hpcutils.data.chunks import inflate, undo_filters
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.order import Order, Seat
from hpcutils.data.segments import count_chunks, layout_of
from hpcutils.data.windows import WindowReader

# Makes a step of the model take several times as long as its data, forwards and backwards, on the core that a rank has.
UNITS = 512


def windows(path: str, name: str, batch: int, epochs: int) -> dict:
    world = MPI.COMM_WORLD
    x = HDF5Matrix(path, name)
    order = Order(layout_of(x), batch, Seat(ranks=world.size, rank=world.rank), seed=1)
    reader = WindowReader([x], order, world, epochs)
    rows = []
    for epoch in range(epochs):
        world.Barrier()
        started = time.perf_counter()
        reader.begin(epoch)
        plan = order.epoch(epoch)
        for step in range(order.steps):
            reader.read(step, plan.cut(step))
        world.Barrier()
        rows.append(order.samples / (time.perf_counter() - started))
    chunks = [world.allreduce(reader.chunks_read(epoch)) / count_chunks(x.segments) for epoch in range(epochs)]
    reader.close()
    return {"samples_per_s": rows, "chunks": chunks}


def steps(path: str, name: str, batch: int, epochs: int, samples: int) -> dict:
    """Train a dense model by the feed and the steps of a job; return the share of each epoch that it waited for data."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import tensorflow as tf

    from hpcutils.train.feed import RowFeed
    from hpcutils.train.reading import ReadPlan, WindowSource
    from hpcutils.train.steps import StepRunner, steps_per_call

    world = MPI.COMM_WORLD
    # Ranks share the cores, as in a job.
    tf.config.threading.set_intra_op_parallelism_threads(max(1, len(os.sched_getaffinity(0)) // world.size))
    with h5py.File(path, "r", locking=False) as file:
        end = min(samples, len(file[name]))
    x, y = HDF5Matrix(path, name, 0, end), HDF5Matrix(path, "y", 0, end)
    order = Order(layout_of(x, y), batch, Seat(ranks=world.size, rank=world.rank), seed=1)
    feed = RowFeed(WindowSource(x, y, ReadPlan("window", True, order, 0), world, epochs), order)
    model = keras.Sequential([keras.layers.Input(x.shape[1:]), keras.layers.Dense(UNITS, "relu"), keras.layers.Dense(10)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)

    def used(count: int) -> None:
        for _ in range(count):
            feed.used()

    runner = StepRunner(model.train_step, feed, order.steps, steps_per_call(feed), lambda: None, used)
    waited, seconds = [], []
    for epoch in range(epochs):
        world.Barrier()
        started = time.perf_counter()
        feed.begin_epoch(epoch)
        runner.begin()
        while runner.done < order.steps:
            runner(None)
        seconds.append(time.perf_counter() - started)
        waited.append(runner.wait_s / seconds[-1])
    runner.end()
    fetched = [world.allreduce(feed.chunks_read(epoch)) / feed.chunks for epoch in range(epochs)]
    feed.close()
    waited = [max(part) for part in zip(*world.allgather(waited), strict=True)]
    return {"waited": waited, "chunks": fetched, "step_s": min(seconds) / order.steps}


def parts(what: str, path: str, name: str) -> dict:
    """Return how many samples a second the chunks give by themselves, on as many cores as there are ranks."""
    world = MPI.COMM_WORLD
    dataset = HDF5Matrix(path, name)._open().reader._dataset
    chunk_rows, size = dataset.chunks[0], int(np.prod(dataset.chunks)) * dataset.dtype.itemsize
    stored = [
        dataset.id.read_direct_chunk((start, *[0] * (dataset.ndim - 1)))[1] for start in range(0, 64 * chunk_rows, chunk_rows)
    ]
    out = np.empty((chunk_rows, *dataset.shape[1:]), dataset.dtype)
    reader = HDF5Matrix(path, name)
    best = 0.0
    for _ in range(5):
        world.Barrier()
        started = time.perf_counter()
        for number, data in enumerate(stored):
            if what == "inflate":
                inflate(data, size)
            elif what == "undo":
                undo_filters(data, (2, 1), 0, size)
            else:
                reader.read_into(number * chunk_rows, out)
        world.Barrier()
        best = max(best, world.size * len(stored) * chunk_rows / (time.perf_counter() - started))
    return {"samples_per_s": [best]}


def copy(path: str, name: str, batch: int) -> dict:
    """Return how many samples a second all ranks copy, from the page cache, in neighbouring pieces of a batch."""
    world = MPI.COMM_WORLD
    rows = np.memmap(path, "u1", "r")
    row_bytes = HDF5Matrix(path, name).row_bytes
    piece = batch // world.size * row_bytes
    out = np.empty(piece, "u1")
    mine = range(world.rank * piece, len(rows) - piece * world.size, piece * world.size)
    best = 0.0
    for _ in range(3):
        world.Barrier()
        started = time.perf_counter()
        for start in mine:
            np.copyto(out, rows[start : start + piece])
        world.Barrier()
        best = max(best, world.size * len(mine) * piece / row_bytes / (time.perf_counter() - started))
    return {"samples_per_s": [best]}


def main() -> None:
    what, path, name, batch, epochs = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    if what == "windows":
        said = windows(path, name, batch, epochs)
    elif what == "steps":
        said = steps(path, name, batch, epochs, int(sys.argv[6]))
    elif what == "copy":
        said = copy(path, name, batch)
    else:
        said = parts(what, path, name)
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(said))


if __name__ == "__main__":
    main()
