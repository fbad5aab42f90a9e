"""What each MPI rank of `test_windows.py` runs: read epochs in windows, check every row, print one JSON line on rank 0.

    mpirun -n RANKS python window_ranks.py FILE NODES [more=…]

The ranks are dealt over `NODES` groups that share no memory, as if they ran on as many hosts.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np
from mpi4py import MPI

from hpcutils.data import shards
from hpcutils.data.collective import CollectiveReader
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.order import Certificate, Order, Seat, certificate_of
from hpcutils.data.windows import WindowReader, layout_of


def main() -> None:
    path, nodes = sys.argv[1], int(sys.argv[2])
    options = {"batch": 20, "epochs": 3, "background": 1, "pool": 40 * 24, "fail": -1, "by_shards": 1, "mpio": 0} | {
        name: int(value) for name, _, value in (word.partition("=") for word in sys.argv[3:])
    }
    shards.POOL_BYTES = options["pool"]
    world = MPI.COMM_WORLD
    each = world.size // nodes
    node = world.Split(world.rank // each)
    x, y = HDF5Matrix(path, "x", 5), HDF5Matrix(path, "y", 5)
    seat = Seat(nodes, world.rank // each, each, world.rank % each) if options["by_shards"] else Seat(1, 0, world.size, world.rank)
    order = Order(layout_of(x), options["batch"], seat, seed=4)
    reads = count_collective_reads() if options["mpio"] else {}
    if options["mpio"]:
        reader: WindowReader = CollectiveReader([x, y], order, node, options["epochs"])
    else:
        reader = WindowReader([x, y], order, node, options["epochs"], bool(options["background"]))
    if world.rank == options["fail"]:
        reader.matrices[0].close()
    started = time.perf_counter()
    counts = []
    for epoch in range(options["epochs"]):
        reader.begin(epoch)
        counts.append(read_epoch(reader, epoch, world, 0))
    # From the middle of an epoch that was read before: what a resumed run does.
    if options["epochs"] > 1:
        reader.begin(1, order.steps // 2)
        read_epoch(reader, 1, world, order.steps // 2)
    seconds = time.perf_counter() - started
    reader.close()
    if world.rank == 0:
        chunks = [int(count) for count in counts]
        print(json.dumps({"reads": reads, "chunks": chunks, "all": order.layout.chunks, "steps": order.steps, "seconds": seconds}))


def count_collective_reads() -> dict[str, int]:
    """Return a dictionary that will hold how often HDF5, asked after each read, says which kind it was."""
    libraries = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libhdf5" in line]
    hdf5 = ctypes.CDLL(next(path for path in libraries if "_hl" not in path and "_cpp" not in path))
    hdf5.H5Pget_mpio_actual_io_mode.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_int)]
    read, reads = CollectiveReader._read_together, {"collective": 0, "other": 0}

    def read_and_ask(self: CollectiveReader, *args: object) -> None:
        read(self, *args)
        mode = ctypes.c_int(-1)
        assert hdf5.H5Pget_mpio_actual_io_mode(self._transfer.id, ctypes.byref(mode)) >= 0
        # H5D_mpio_actual_io_mode_t: 0 none, 1 chunk independent, 2 chunk collective, 3 mixed, 4 contiguous collective.
        reads["collective" if mode.value in (2, 4) else "other"] += 1

    CollectiveReader._read_together = read_and_ask
    return reads


def read_epoch(reader: WindowReader, epoch: int, world: MPI.Comm, first_step: int) -> int:
    """Read what is left of an epoch as training does, the ranks in step; return the chunks that all ranks fetched."""
    order, plan = reader.order, reader.order.epoch(epoch)
    seen = Certificate()
    for step in range(first_step, order.steps):
        cut = plan.cut(step)
        rows, labels = reader.read(step, cut)
        assert rows.shape == (order.local_rows, 6)
        if cut.from_node:
            np.testing.assert_array_equal(labels, cut.rows + 5)
        np.testing.assert_array_equal(rows[:, 0], labels * 6)
        seen = seen.add(cut.rows[: cut.real])
        # The step's own allreduce: no rank is ahead of another by more than one step.
        total = np.array([float(cut.weights.mean())])
        world.Allreduce(MPI.IN_PLACE, total)
        assert abs(total[0] / world.size - 1) < 1e-6
    joined = Certificate()
    for part in world.allgather(seen):
        joined = joined.join(part)
    assert seen.over(world) == joined
    if first_step == 0:
        assert joined == certificate_of(order.samples)
    return world.allreduce(reader.chunks_read(epoch))


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # noqa: BLE001 - a rank that only raised would hang in MPI_Finalize
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(3)
