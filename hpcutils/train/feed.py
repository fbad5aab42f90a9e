"""Batches for Keras: this rank's part of every global batch, each sample once an epoch, with proof."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hpcutils.data.arrays import to_categorical
from hpcutils.data.order import Certificate, Cut, Epoch, Order
from hpcutils.data.sequence import Sequence

Array = NDArray[Any]
Batch = tuple[Array, Array, Array]


class Source(Protocol):
    """Where samples come from: the rows of x and y, read together. `chunks` is how many chunks they lie in."""

    mode: str
    chunks: int

    def begin(self, epoch: int, first_step: int) -> None:
        """Get ready to read an epoch from a step on; the ranks of a node call it together."""

    def read(self, step: int, cut: Cut) -> tuple[Array, Array]:
        """Return the rows of a cut, `(local_rows, ...)` each; steps are read in order."""

    def example(self, rows: int) -> tuple[Array, Array]:
        """Return the first sample `rows` times over, at any time."""

    def chunks_read(self, epoch: int) -> int:
        """Return how many chunks this rank fetched for an epoch."""

    def close(self) -> None:
        """Let go of memory and files; the ranks of a node call it together."""


class Feed(Sequence):
    """The `(x, y, weight)` batches of one rank: the global batches of a `Sequence`, cut over the ranks.

    Whoever iterates before `begin_epoch`, or goes on after the next one, never touches what belongs to the epoch.

    Args:
        source: The samples.
        order: Which samples this rank takes at each step.
        normalizer: Applied to each x batch, `(rows, ...)` to `(rows, ...)`.
        classes: Turn integer labels into `(rows, classes)` float32, or `None`.

    Attributes:
        certificate: Count, sum and xor of the samples that this rank's steps have used in this epoch.
        first_step: The step that this epoch began with.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        normalizer: Callable[[Any], Any] | None = None,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.source, self.order = source, order
        self.normalizer, self.classes = normalizer, classes
        self.certificate = Certificate()
        self.first_step = 0
        self._epoch: Epoch | None = None
        # Of each batch that was made and not used yet: the certificate with it.
        self._made: deque[Certificate] = deque()

    def __len__(self) -> int:
        return self.order.steps

    def __getitem__(self, step: int) -> Batch:
        """Return batch `step` of the epoch that has begun, `order.local_rows` rows; steps are asked for in order."""
        return self._make(self._epoch, step)[0] if self._epoch is not None else self.example()

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Take the order of `epoch` from `first_step` on, and start to count anew; all ranks call it together."""
        self._epoch, self.first_step = None, first_step
        self.source.begin(epoch, first_step)
        self.certificate, self._made = Certificate(), deque()
        self._epoch = self.order.epoch(epoch)

    def used(self) -> None:
        """Count the next batch as used by a step."""
        self.certificate = self._made.popleft()

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of the epoch that has begun; before the first one, examples of the same shapes."""
        epoch, made, certificate = self._epoch, self._made, Certificate()
        if epoch is None:
            yield from [self.example()] * len(self)
            return
        for step in range(self.first_step, len(self)):
            if self._epoch is not epoch:
                return
            batch, cut = self._make(epoch, step)
            certificate = certificate.add(cut.rows[: cut.real])
            made.append(certificate)
            yield batch

    def dataset(self, first_step: int = 0) -> Any:
        """Return a `tf.data.Dataset` as long as an epoch, of examples: Keras counts its batches and looks at their shapes.

        Args:
            first_step: What the epochs of this data set begin with.
        """
        import tensorflow as tf

        # As many examples as steps: no batch goes through it.
        return tf.data.Dataset.from_tensors(self.example()).repeat(len(self) - first_step)

    def close(self) -> None:
        """Let go of the data; all ranks call it together."""
        self._epoch = None
        self.source.close()

    def example(self) -> Batch:
        """Return a batch of the first sample, with weights of 0."""
        x, y = self.source.example(self.order.local_rows)
        return *self._finished(x, y), np.zeros(self.order.local_rows, np.float32)

    def _make(self, epoch: Epoch, step: int) -> tuple[Batch, Cut]:
        cut = epoch.cut(step)
        x, y = self._finished(*self.source.read(step, cut))
        return (x, y, cut.weights), cut

    def _finished(self, x: Array, y: Array) -> tuple[Array, Array]:
        if self.normalizer is not None:
            x = self.normalizer(x)
        if self.classes is not None:
            y = to_categorical(y, self.classes)
        return _native(x), _native(y)


def _native(array: Any) -> Array:
    """Return the array in the machine's byte order, the only one that TensorFlow takes."""
    array = np.asarray(array)
    native: Array = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    return native
