"""Who takes which whole batches of a user's `Sequence`, and what their rows weigh: pure arithmetic, no I/O.

The batches are dealt out as samples are (`hpcutils.data.order`): a chunk is a batch here, and a global batch is so many of them.
All have the same number of rows but for the last one, which may have fewer. It comes in the last step of every epoch: whatever
the order has at its very end changes places with it. So all global batches but the last have the same number of samples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcutils.data.order import Order, Rows, Seat
from hpcutils.data.shards import Layout
from hpcutils.errors import DataError


@dataclass(frozen=True, eq=False)
class BatchCut:
    """One rank's part of one global batch.

    Args:
        numbers: `(n,)` int64 numbers of the batches that this rank takes, in order; none where there are fewer than ranks.
        weights: `(local_rows,)` float32: what each row weighs, those of `numbers` first; 0 for the padding after them.
    """

    numbers: Rows
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class BatchOrder:
    """The plan of all epochs for one rank, in samples where nothing else is said.

    Args:
        batches: Number of the Sequence's batches.
        rows: Samples of each but perhaps the last.
        last_rows: Samples of the last one.
        batch_size: Samples of a full global batch, a multiple of `rows`.
        seat: This rank's, by count.
        seed: Of the shuffle.
        shuffle: Whether epochs are permuted.

    Raises:
        DataError: The sizes do not fit each other.
    """

    batches: int
    rows: int
    last_rows: int
    batch_size: int
    seat: Seat
    seed: int = 0
    shuffle: bool = True

    items = "batches"

    def __post_init__(self) -> None:
        if self.batch_size % self.rows:
            lower = self.batch_size // self.rows * self.rows
            near = f"{lower} or {lower + self.rows}" if lower else str(self.rows)
            raise DataError(
                f"training.batch_size {self.batch_size} is no multiple of {self.rows}, the rows of the Sequence's batches: "
                "each is taken whole",
                f"make it {near}, or let the Sequence make batches of another size",
            )
        if not 0 < self.last_rows <= self.rows:
            raise DataError(
                f"batch {self.batches - 1}, the last one, has {self.last_rows} rows; from 1 to {self.rows} were expected",
                "all batches of a Sequence have as many rows as batch 0; the last one may have fewer",
            )

    @cached_property
    def plan(self) -> Order:
        """The order of the batches, each as if it were one sample."""
        return Order(self.layout, self.batch_size // self.rows, self.seat, self.seed, self.shuffle)

    @property
    def layout(self) -> Layout:
        """How the batches lie: each is a chunk."""
        return Layout(self.batches)

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return (self.batches - 1) * self.rows + self.last_rows

    @property
    def steps(self) -> int:
        """Global batches of an epoch; every rank takes all of them."""
        return self.plan.steps

    @property
    def local_rows(self) -> int:
        """Rows of each local batch, the last one included: shapes never change."""
        return self.plan.local_rows * self.rows

    def batch_samples(self, step: int) -> int:
        """Return the number of samples in a global batch: `batch_size` for all but perhaps the last."""
        return min(self.batch_size, self.samples - step * self.batch_size)

    def weight(self, step: int) -> float:
        """Return what a real row of global batch `step` weighs, so that the mean of the ranks' mean losses is the batch's mean."""
        return self.seat.world_size * self.local_rows / self.batch_samples(step)

    def epoch(self, number: int) -> BatchEpoch:
        """Return the order of an epoch."""
        return BatchEpoch(self, number)

    def digest(self) -> tuple[Any, ...]:
        """Return what all ranks must agree on before the first step."""
        return (self.samples, self.rows, self.batch_size, *self.plan.digest()[:-1], self.name())

    def name(self) -> str:
        """Return a hash of the sizes and of some of the first epoch's order, 16 hex digits: the same for every world."""
        facts = (self.batches, self.rows, self.last_rows, self.plan.name())
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


class BatchEpoch:
    """One epoch of a `BatchOrder`.

    Args:
        order: The plan.
        number: Which epoch.
    """

    def __init__(self, order: BatchOrder, number: int) -> None:
        self.order = order
        self._epoch = order.plan.epoch(number)
        self._last = order.batches - 1
        # The batch that changes places with the last one.
        self._at_end = int(self._epoch.sequence.run(self._last, self._last + 1).rows[0])

    def cut(self, step: int) -> BatchCut:
        """Return this rank's part of global batch `step`."""
        order, cut = self.order, self._epoch.cut(step)
        found = cut.rows[: cut.real]
        numbers = np.where(found == self._last, self._at_end, np.where(found == self._at_end, self._last, found))
        short = order.rows - order.last_rows if self._last in numbers else 0
        weights = np.zeros(order.local_rows, np.float32)
        weights[: len(numbers) * order.rows - short] = order.weight(step)
        return BatchCut(numbers, weights)
