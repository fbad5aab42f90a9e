"""Who reads which sample when: pure arithmetic, no I/O.

The order of an epoch (`hpcutils.data.shards`) is a function of (seed, epoch, layout of the data) alone. It is cut into *global*
batches first, and each global batch over the ranks after that: any number of ranks trains on the same global batches.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hpcutils.data.layout import Layout
from hpcutils.data.scramble import Ints, mixed
from hpcutils.data.shards import EpochOrder, Run, node_rows, shard_count

Rows = NDArray[np.int64]

# Positions that are worked out at once: enough that numpy's cost a call does not count, few enough to stay in a core's cache.
BLOCK = 1 << 14


@dataclass(frozen=True)
class Seat:
    """Which part of each global batch one rank takes: a node its shards, the ranks of a node even parts of that.

    Args:
        nodes: Parts by shards; divides the number of shards. 1 cuts batches by count alone.
        node: Which of these is ours.
        ranks: Ranks that share one part.
        rank: Which of these is ours.
    """

    nodes: int = 1
    node: int = 0
    ranks: int = 1
    rank: int = 0

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks


@dataclass(frozen=True, eq=False)
class Cut:
    """One rank's part of one global batch.

    Args:
        rows: `(local_rows,)` int64 sample numbers; the padding repeats samples of the same batch.
        weights: `(local_rows,)` float32; 0 for padding. Real rows weigh so that the mean over ranks of each rank's mean loss is
            the mean over the samples of the global batch.
        real: How many of `rows`, from the first, are this rank's own samples.
        shards: `(local_rows,)` the shard of each.
        windows: `(local_rows,)` its window among its shard's.
        places: `(local_rows,)` its place in that window.
        from_node: Whether `rows` are of this node's shards. They are not where a batch has none of them: all is padding then.
    """

    rows: Rows
    weights: NDArray[np.float32]
    real: int
    shards: Ints
    windows: Ints
    places: Ints
    from_node: bool


@dataclass(frozen=True)
class Order:
    """The plan of all epochs for one rank.

    Args:
        layout: How the samples lie in chunks.
        batch_size: Samples of a full global batch.
        seat: This rank's.
        seed: Of the shuffle.
        shuffle: Whether epochs are permuted (validation is not).
    """

    layout: Layout
    batch_size: int
    seat: Seat = Seat()
    seed: int = 0
    shuffle: bool = True

    items = "samples"

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return self.layout.samples

    @property
    def steps(self) -> int:
        """Global batches of an epoch; every rank takes all of them."""
        return -(-self.samples // self.batch_size)

    @cached_property
    def local_rows(self) -> int:
        """Rows of each local batch, the last one included: shapes never change."""
        of_node = node_rows(self.layout, self.batch_size, self.seat.nodes) if self.seat.nodes > 1 else self.batch_size
        return -(-of_node // self.seat.ranks)

    @property
    def shards(self) -> int:
        """Number of canonical shards."""
        return shard_count(self.layout) if self.shuffle else 1

    def batch_samples(self, step: int) -> int:
        """Return the number of samples in a global batch: `batch_size` for all but perhaps the last."""
        return min(self.batch_size, self.samples - step * self.batch_size)

    def weight(self, step: int) -> float:
        """Return what a real row of global batch `step` weighs, so that the mean of the ranks' mean losses is the batch's mean."""
        return self.seat.world_size * self.local_rows / self.batch_samples(step)

    def epoch(self, number: int) -> Epoch:
        """Return the order of an epoch."""
        return Epoch(self, number)

    def digest(self) -> tuple[Any, ...]:
        """Return what all ranks must agree on before the first step: sizes, and the order's name."""
        facts = (self.samples, self.batch_size, self.seat.world_size, self.steps, self.shards, self.local_rows, self.seed)
        return (*facts, self.name())

    def name(self) -> str:
        """Return a hash of some of the first epoch's order, 16 hex digits: the same for every world."""
        order = EpochOrder(self.layout, self.seed, 0, self.shuffle)
        middle = self.samples // 2
        some = np.concatenate([order.run(start, min(start + 512, self.samples)).rows for start in (0, middle)])
        return hashlib.sha256(some.astype("<i8").tobytes()).hexdigest()[:16]


class Steps(Protocol):
    """A plan of epochs as training sees it, whatever is dealt out: `Order`, or `hpcutils.data.batches.BatchOrder`.

    Attributes:
        items: What certificates count.
    """

    items: str

    @property
    def seed(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def seat(self) -> Seat: ...
    @property
    def samples(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def local_rows(self) -> int: ...
    def batch_samples(self, step: int) -> int: ...
    def weight(self, step: int) -> float: ...
    def name(self) -> str: ...


class Epoch:
    """One epoch of an `Order`: the cut of any step, worked out for a block of steps at once.

    Args:
        order: The plan.
        number: Which epoch.
    """

    def __init__(self, order: Order, number: int) -> None:
        self.order, self.number = order, number
        self.sequence = EpochOrder(order.layout, order.seed, number, order.shuffle)
        self._block_steps = max(1, BLOCK // order.batch_size)
        self._block = -1
        self._run: Run
        # (steps + 1,): where each step's part of `_run` begins.
        self._edges: Ints

    def cut(self, step: int) -> Cut:
        """Return this rank's part of global batch `step`."""
        order, seat = self.order, self.order.seat
        block, number = divmod(step, self._block_steps)
        if block != self._block:
            self._load(block)
        start, stop = int(self._edges[number]), int(self._edges[number + 1])
        run = self._run
        from_node = stop > start
        if not from_node:
            position = step * order.batch_size
            run, start, stop = self.sequence.run(position, position + 1), 0, 1
        real = range(*((stop - start) * rank // seat.ranks for rank in (seat.rank, seat.rank + 1))) if from_node else range(0)
        # Padding takes real samples of the same batch, never zeros: a loss that is not finite at zero would turn 0 * inf into NaN.
        picked = start + (real.start + np.arange(order.local_rows)) % (stop - start)
        weights = np.zeros(order.local_rows, np.float32)
        weights[: len(real)] = order.weight(step)
        parts = (run.shards[picked], run.windows[picked], run.places[picked])
        return Cut(run.rows[picked], weights, len(real), *parts, from_node)

    def _load(self, block: int) -> None:
        order, seat = self.order, self.order.seat
        first = block * self._block_steps * order.batch_size
        last = min(first + self._block_steps * order.batch_size, order.samples)
        run = self.sequence.run(first, last, seat.node, seat.nodes)
        ours = np.flatnonzero(run.shards % seat.nodes == seat.node)
        borders = np.arange(0, last - first + order.batch_size, order.batch_size)
        self._edges = np.searchsorted(ours, borders)
        self._run = Run(run.rows[ours], run.shards[ours], run.windows[ours], run.places[ours])
        self._block = block


@dataclass(frozen=True)
class Certificate:
    """What is known of a multiset of samples without keeping it: count, sum and xor of their hashes (mod 2^64)."""

    count: int = 0
    total: int = 0
    xor: int = 0

    def add(self, rows: Rows) -> Certificate:
        """Return the certificate with `rows` added."""
        hashes = mixed(rows)
        total = (self.total + int(hashes.sum(dtype=np.uint64))) % 2**64
        xor = self.xor ^ int(np.bitwise_xor.reduce(hashes)) if len(rows) else self.xor
        return Certificate(self.count + len(rows), total, xor)

    def join(self, other: Certificate) -> Certificate:
        """Return the certificate of both multisets together."""
        return Certificate(self.count + other.count, (self.total + other.total) % 2**64, self.xor ^ other.xor)

    def over(self, comm: Any) -> Certificate:
        """Return the certificate of the multisets of all ranks of an mpi4py communicator; all call it together."""
        from mpi4py import MPI

        # 24 bytes, whatever the number of ranks; unsigned numbers are added mod 2^64.
        sums, xor = np.array([self.count, self.total], np.uint64), np.array([self.xor], np.uint64)
        comm.Allreduce(MPI.IN_PLACE, sums, op=MPI.SUM)
        comm.Allreduce(MPI.IN_PLACE, xor, op=MPI.BXOR)
        return Certificate(int(sums[0]), int(sums[1]), int(xor[0]))


def certificate_of(samples: int, first: int = 0, block: int = 1 << 16) -> Certificate:
    """Return the certificate of samples `first` to `samples`, each once, in constant memory; some 4 ns a sample."""
    certificate = Certificate()
    for start in range(first, samples, block):
        certificate = certificate.add(np.arange(start, min(start + block, samples), dtype=np.int64))
    return certificate
