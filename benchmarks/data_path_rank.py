"""One MPI rank of `bench_data_path`: read shuffled epochs in windows, or only do the parts of that work; one JSON line on rank 0.

    mpirun -n 2 python -m benchmarks.data_path_rank WHAT FILE DATASET BATCH EPOCHS [STEP_MS]

WHAT is `windows`, `inflate` (the chunks' bytes, nothing else), `decode` (the same and unshuffle) or `copy` (rows in memory, twice).
STEP_MS is what a training step would take: the rank sleeps so long, and what it waits for its batch beyond that is counted.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque

import numpy as np
from mpi4py import MPI

from hpcutils.data.chunks import inflate, undo_filters
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.order import Order, Seat
from hpcutils.data.windows import WindowReader, layout_of

AHEAD = 2


def windows(path: str, name: str, batch: int, epochs: int, step_s: float) -> dict:
    world = MPI.COMM_WORLD
    x = HDF5Matrix(path, name)
    order = Order(layout_of(x), batch, Seat(ranks=world.size, rank=world.rank), seed=1)
    reader = WindowReader([x], order, world, epochs)
    rows, waited = [], []
    for epoch in range(epochs):
        world.Barrier()
        started = time.perf_counter()
        waited.append(epoch_in_steps(reader, epoch, step_s) if step_s else epoch_at_full_speed(reader, epoch))
        world.Barrier()
        rows.append(order.samples / (time.perf_counter() - started))
    chunks = [world.allreduce(reader.chunks_read(epoch)) / order.layout.chunks for epoch in range(epochs)]
    reader.close()
    return {"samples_per_s": rows, "chunks": chunks, "waited": [max(part) for part in zip(*world.allgather(waited), strict=True)]}


def epoch_at_full_speed(reader: WindowReader, epoch: int) -> float:
    reader.begin(epoch)
    plan = reader.order.epoch(epoch)
    for step in range(reader.order.steps):
        reader.read(step, plan.cut(step))
    return 0.0


def epoch_in_steps(reader: WindowReader, epoch: int, step_s: float) -> float:
    """Return the share of the epoch in which steps of `step_s` seconds had no batch; batches are made ahead, as in training."""
    reader.begin(epoch)
    plan, made, space = reader.order.epoch(epoch), deque(), threading.Semaphore(AHEAD)
    ready = threading.Semaphore(0)

    def make() -> None:
        for step in range(reader.order.steps):
            space.acquire()
            made.append(reader.read(step, plan.cut(step)))
            ready.release()

    thread = threading.Thread(target=make)
    thread.start()
    started, waited = time.perf_counter(), 0.0
    for _ in range(reader.order.steps):
        asked = time.perf_counter()
        ready.acquire()
        waited += time.perf_counter() - asked
        made.popleft()
        space.release()
        time.sleep(step_s)
    thread.join()
    return waited / (time.perf_counter() - started)


def parts(what: str, path: str, name: str) -> dict:
    """Return how many samples a second the chunks give by themselves, on as many cores as there are ranks."""
    world = MPI.COMM_WORLD
    dataset = HDF5Matrix(path, name)._reader()._dataset
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
    step_s = float(sys.argv[6]) / 1e3 if len(sys.argv) > 6 else 0.0
    if what == "windows":
        said = windows(path, name, batch, epochs, step_s)
    elif what == "copy":
        said = copy(path, name, batch)
    else:
        said = parts(what, path, name)
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(said))


if __name__ == "__main__":
    main()
