"""How a job's data is read: from memory, in windows, or by each rank for itself; and which seat a rank has then.

memory        the datasets fit: a node's ranks decode them together, once, before the first step
window        they do not: a node's ranks decode them window after window, each chunk once an epoch, ahead of the steps
mpio          as window, by collective MPI-IO between the steps
independent   each rank reads its own samples from the file; no memory is shared
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hpcutils.data.chunks import cache_limit
from hpcutils.data.collective import CollectiveReader, check_parallel_hdf5
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.node import NodeArray
from hpcutils.data.order import Cut, Order, Seat
from hpcutils.data.room import ranks_here, usable_bytes
from hpcutils.data.segments import Matrix, count_chunks, is_chunked, times_fetched
from hpcutils.data.shared import free_memory_bytes
from hpcutils.data.windows import WindowReader, window_bytes
from hpcutils.errors import DataError
from hpcutils.log import LOGGER
from hpcutils.train.feed import Source
from hpcutils.train.ranks import Ranks

Mode = Literal["memory", "window", "mpio", "independent"]
Array = NDArray[Any]

# Training and held-out data may each take this part of the memory that is free on the node when the job opens them.
MEMORY_SHARE = 0.25


@dataclass(frozen=True)
class ReadPlan:
    """How the samples of one split are read.

    Args:
        mode: How x is read.
        y_in_memory: Whether y, mostly small, is in memory whatever x does.
        order: This rank's part of the batches.
        memory_bytes: What this takes of a node's memory, shared by its ranks.
        cache_bytes: What a rank may keep of inflated chunks, for all that it reads.
    """

    mode: Mode
    y_in_memory: bool
    order: Order
    memory_bytes: int
    cache_bytes: int = 0

    def __str__(self) -> str:
        parts = [f"{self.order.shards} shards", f"{self.memory_bytes / 2**20:.1f} MiB a node"]
        parts += [f"up to {self.cache_bytes / 2**20:.0f} MiB of chunks a rank"] if self.cache_bytes else []
        parts += ["cut by nodes"] if self.order.seat.nodes > 1 else []
        return f"{self.mode} ({', '.join(parts)})"


def seats(ranks: Ranks) -> tuple[Seat, Seat | None]:
    """Return this rank's seat where batches are cut by count, and where nodes own shards (`None`: nodes of unequal size)."""
    world = ranks.world
    by_count = Seat(ranks=world.world_size, rank=world.rank)
    if ranks.node_comm is None:
        return by_count, by_count
    leaders = ranks.gather(ranks.node_comm.bcast(world.rank))
    nodes = sorted(set(leaders))
    if len({leaders.count(node) for node in nodes}) > 1:
        return by_count, None
    node = nodes.index(leaders[world.rank])
    return by_count, Seat(len(nodes), node, ranks.node_comm.size, ranks.node_comm.rank)


def plan_reading(
    x: Matrix,
    y: Matrix,
    order: Order,
    by_node: Seat | None,
    read: str,
    budget_bytes: int,
    cache_bytes: int = 0,
    *,
    arriving: bool = False,
) -> tuple[ReadPlan, str | None]:
    """Choose how to read; return also why it is not what was asked for, if so.

    Args:
        x: The samples.
        y: The labels.
        order: With the seat that cuts by count.
        by_node: The seat where nodes own shards.
        read: `window`, `mpio` or `independent`, from train.yaml.
        budget_bytes: What the data may take of a node's memory.
        cache_bytes: What a rank that reads for itself may keep of inflated chunks.
        arriving: The data is on its way to the node: what does not need all of it before the first step is better.
    """
    if read == "independent":
        return ReadPlan("independent", False, order, 0, cache_bytes), None
    whole = x.nbytes + y.nbytes
    if whole <= budget_bytes:
        needed = window_bytes(order, x.row_bytes) + y.nbytes
        if arriving and y.nbytes <= whole // 8 and needed < whole:
            # Cut by count, as from memory: the same samples on each rank, and the same sums to the last bit.
            return ReadPlan("window", True, order, needed), None
        return ReadPlan("memory", True, order, whole), None
    owned = order
    if order.shuffle and by_node is not None and order.shards % by_node.nodes == 0:
        owned = replace(order, seat=by_node)
    small = y.nbytes <= budget_bytes // 8
    needed = window_bytes(owned, x.row_bytes + (0 if small else y.row_bytes)) + (y.nbytes if small else 0)
    if needed <= budget_bytes:
        return ReadPlan("mpio" if read == "mpio" else "window", small, owned, needed), None
    short = f"windows need {needed / 2**20:.0f} MiB of a node's memory and may take {budget_bytes / 2**20:.0f}"
    return ReadPlan("independent", False, order, 0, cache_bytes), short


class RowSource:
    """Samples by their numbers: from memory, or from the file by each rank for itself.

    Args:
        x: The samples.
        y: The labels.
        node: mpi4py communicator of the node's ranks, or `None`.
        in_memory: Whether to decode all of both first.
    """

    needs_main_thread = False

    def __init__(self, x: Matrix, y: Matrix, node: Any, in_memory: bool) -> None:
        self.mode = "memory" if in_memory else "independent"
        self._x, self._y = (NodeArray(matrix, node, in_memory) for matrix in (x, y))
        self.chunks = count_chunks(x.segments) + count_chunks(y.segments)

    def begin(self, epoch: int, first_step: int) -> None:
        """Nothing to do."""

    def read(self, step: int, cut: Cut) -> tuple[Array, Array]:
        return self._x.read_rows(cut.rows), self._y.read_rows(cut.rows)

    def example(self, rows: int) -> tuple[Array, Array]:
        first = np.zeros(rows, np.int64)
        return self._x.read_rows(first), self._y.read_rows(first)

    def chunks_read(self, epoch: int) -> int | None:
        if self.mode == "independent":
            return None
        return self._x.chunks_read + self._y.chunks_read if epoch == 0 else 0

    def close(self) -> None:
        self._x.close()
        self._y.close()


class WindowSource:
    """Samples in the order of an epoch, decoded ahead of the steps; y from memory where it is small.

    Args:
        x: The samples.
        y: The labels.
        plan: From `plan_reading`.
        node: mpi4py communicator of the node's ranks, or `None`.
        epochs: Of the job.
    """

    def __init__(self, x: Matrix, y: Matrix, plan: ReadPlan, node: Any, epochs: int) -> None:
        self._x, self._y = x, y
        self._labels = NodeArray(y, node) if plan.y_in_memory else None
        matrices = [x] if plan.y_in_memory else [x, y]
        # Where only one of both has chunks, what is counted is those.
        self._counted = [number for number, matrix in enumerate(matrices) if is_chunked(matrix)] or [0]
        self.chunks = sum(count_chunks(matrices[number].segments) for number in self._counted)
        self.mode: str = plan.mode
        files = [matrix for matrix in matrices if isinstance(matrix, HDF5Matrix)]
        together = plan.mode == "mpio" and node is not None
        self._reader: WindowReader = (
            CollectiveReader(files, plan.order, node, epochs) if together else WindowReader(matrices, plan.order, node, epochs)
        )
        # Without threads of its own it decodes and waits in the thread that reads.
        self.needs_main_thread: bool = not self._reader.in_background

    def begin(self, epoch: int, first_step: int) -> None:
        self._reader.begin(epoch, first_step)

    def read(self, step: int, cut: Cut) -> tuple[Array, Array]:
        read = self._reader.read(step, cut)
        return read[0], self._labels.read_rows(cut.rows) if self._labels is not None else read[1]

    def example(self, rows: int) -> tuple[Array, Array]:
        x, y = (matrix.read_rows(np.zeros(1, np.int64)) for matrix in (self._x, self._y))
        return np.repeat(x, rows, axis=0), np.repeat(y, rows, axis=0)

    def chunks_read(self, epoch: int) -> int:
        return sum(self._reader.chunks_read(epoch, number) for number in self._counted)

    def close(self) -> None:
        self._reader.close()
        if self._labels is not None:
            self._labels.close()


def open_source(
    x: Matrix, y: Matrix, order: Order, ranks: Ranks, read: str, epochs: int, *, arriving: bool = False
) -> tuple[Source, ReadPlan]:
    """Choose how to read x and y, agree on it with all ranks, and get ready.

    Args:
        x: The samples.
        y: The labels.
        order: The plan, with any seat.
        ranks: All ranks; all call this together.
        read: From train.yaml.
        epochs: Of the job.
        arriving: The data is on its way to the nodes.
    """
    if len(x) != len(y):
        raise DataError(f"x has {len(x)} samples and y has {len(y)}", "both must come from the same split of the same data")
    if read == "mpio" and not (isinstance(x, HDF5Matrix) and isinstance(y, HDF5Matrix)):
        read = "window"
        if ranks.world.rank == 0:
            LOGGER.warning("'read: mpio' takes one file for x and one for y: lists of files are read in windows")
    by_count, by_node = seats(ranks)
    order = replace(order, seat=by_count)
    # Free memory changes while ranks look at it, and nodes differ: the least decides for all.
    budget = min(ranks.gather(int(free_memory_bytes() * MEMORY_SHARE)))
    cache_bytes = cache_limit(usable_bytes(), ranks_here())
    plan, short = plan_reading(x, y, order, by_node, read, budget, cache_bytes, arriving=arriving)
    if short is not None and ranks.world.rank == 0:
        LOGGER.warning("%s: each rank reads for itself, and chunks are decoded more than once", short)
    agree(plan, (x, y), ranks)
    if plan.mode == "mpio":
        ranks.together(check_parallel_hdf5)
    if ranks.world.rank == 0:
        look_at_borders(plan, x, y)
    if plan.mode in ("window", "mpio"):
        return WindowSource(x, y, plan, ranks.node_comm, epochs), plan
    return RowSource(x, y, ranks.node_comm, plan.mode == "memory"), plan


def look_at_borders(plan: ReadPlan, x: Matrix, y: Matrix) -> None:
    """Warn of chunks that windows fetch more than once an epoch, since the chunks of x and y have no borders in common."""
    if plan.mode not in ("window", "mpio"):
        return
    for name, matrix in [("x", x)] + ([] if plan.y_in_memory else [("y", y)]):
        times = times_fetched(plan.order.layout, matrix)
        if times > 1.01:
            LOGGER.warning(
                "the chunks of %s are fetched %.2f times an epoch: those of x have %s rows, those of y %s, and few begin at "
                "the same sample; write one as a multiple of the other",
                *(name, times, *(_chunk_sizes(matrix) for matrix in (x, y))),
            )


def _chunk_sizes(matrix: Matrix) -> str:
    return " or ".join(map(str, sorted({segment.chunk_rows for segment in matrix.segments})))


def agree(plan: ReadPlan, matrices: tuple[Matrix, Matrix], ranks: Ranks) -> None:
    """Compare the plan over ranks: a disagreement is an error here, and would be a hang later."""
    plans = ranks.gather((plan.mode, *plan.order.digest(), *((matrix.shape, str(matrix.dtype)) for matrix in matrices)))
    for rank, other in enumerate(plans):
        if other != plans[0]:
            raise DataError(f"rank {rank} plans {other}, rank 0 plans {plans[0]}", "the nodes do not see the same data")
