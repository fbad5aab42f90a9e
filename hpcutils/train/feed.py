"""Batches for Keras: this rank's part of every global batch, each sample once an epoch, with proof."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hpcutils.data.arrays import to_categorical
from hpcutils.data.node import NodeArray
from hpcutils.data.order import Certificate, Order
from hpcutils.data.sequence import Sequence

Batch = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


class ShardedSequence(Sequence):
    """A Keras data set of `(x, y, weight)` batches for one rank.

    Args:
        x: Samples `(N, ...)`.
        y: Labels `(N, ...)`.
        order: Which samples this rank takes at each step.
        normalizer: Applied to each x batch, `(rows, ...)` to `(rows, ...)`.
        classes: Turn integer labels into `(rows, classes)` float32, or `None`.

    Attributes:
        certificate: Count, sum and xor of the samples handed out since `begin_epoch`.
    """

    # The order is the job's: Keras must not shuffle the steps again.
    orders_itself = True

    def __init__(
        self,
        x: NodeArray,
        y: NodeArray,
        order: Order,
        normalizer: Callable[[Any], Any] | None = None,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.x, self.y, self.order = x, y, order
        self.normalizer, self.classes = normalizer, classes
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Take the order of `epoch` and start to count anew."""
        self._permutation = self.order.permutation(epoch)
        self.certificate = Certificate()

    def __len__(self) -> int:
        return self.order.steps

    def __getitem__(self, step: int) -> Batch:
        """Return `(x, y, weight)` of global batch `step`, `order.local_rows` rows each."""
        cut = self.order.cut(self._permutation, step)
        self.certificate = self.certificate.add(cut.rows[: cut.real])
        x, y = self.x.read_rows(cut.rows), self.y.read_rows(cut.rows)
        if self.normalizer is not None:
            x = self.normalizer(x)
        if self.classes is not None:
            y = to_categorical(y, self.classes)
        return x, y, cut.weights
