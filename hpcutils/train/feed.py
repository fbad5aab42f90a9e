"""Batches for Keras: this rank's part of every global batch, each sample once an epoch, with proof."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hpcutils.data.arrays import to_categorical
from hpcutils.data.order import Certificate, Cut, Order, Rows, Steps
from hpcutils.data.sequence import Sequence

Array: TypeAlias = NDArray[Any]
Arrays: TypeAlias = tuple[Array, ...]
# From a step to the arrays of its batch, and the numbers of the items in it.
Make: TypeAlias = Callable[[int], tuple[Arrays, Rows]]


class Source(Protocol):
    """Where samples come from: the rows of x and y, read together.

    Attributes:
        mode: How they are read.
        needs_main_thread: Whether reading calls MPI, which allows that in the main thread only or takes one call at a time.
        chunks: How many chunks they lie in.
    """

    mode: str
    needs_main_thread: bool
    chunks: int

    def begin(self, epoch: int, first_step: int) -> None:
        """Get ready to read an epoch from a step on; the ranks of a node call it together."""

    def read(self, step: int, cut: Cut) -> tuple[Array, Array]:
        """Return the rows of a cut, `(local_rows, ...)` each; steps are read in order."""

    def example(self, rows: int) -> tuple[Array, Array]:
        """Return the first sample `rows` times over, at any time."""

    def chunks_read(self, epoch: int) -> int | None:
        """Return how many chunks this rank fetched for an epoch; `None` where nobody counts."""

    def close(self) -> None:
        """Let go of memory and files; the ranks of a node call it together."""


class Feed(Sequence, ABC):
    """The `(x, y, weight)` batches of one rank: its part of every global batch.

    Whoever iterates before `begin_epoch`, or goes on after the next one, never touches what belongs to the epoch.

    Args:
        order: What this rank takes at each step.
        mode: How it is read.

    Attributes:
        certificate: Count, sum and xor of the items that this rank's steps have used in this epoch.
        first_step: The step that this epoch began with.
        needs_main_thread: Whether batches must be made in the thread that runs the steps.
    """

    needs_main_thread = False

    def __init__(self, order: Steps, mode: str) -> None:
        super().__init__()
        self.order, self.mode = order, mode
        self.certificate = Certificate()
        self.first_step = 0
        self._make: Make | None = None
        # Of each batch that was made and not used yet: the certificate with it.
        self._made: deque[Certificate] = deque()

    def __len__(self) -> int:
        return self.order.steps

    def __getitem__(self, step: int) -> Any:
        """Return batch `step` of the epoch that has begun, `order.local_rows` rows; steps are asked for in order."""
        return self.pack(self._make(step)[0] if self._make is not None else self.example())

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Take the order of `epoch` from `first_step` on, and start to count anew; all ranks call it together."""
        self._make, self.first_step = None, first_step
        make = self._begin(epoch, first_step)
        self.certificate, self._made = Certificate(), deque()
        self._make = make

    def end_epoch(self) -> None:
        """Note that the epoch's steps are all done; all ranks call it together."""

    def used(self) -> None:
        """Count the next batch as used by a step."""
        self.certificate = self._made.popleft()

    def batches(self) -> Iterator[Arrays]:
        """Yield the batches of the epoch that has begun; before the first one, examples of the same shapes."""
        make, made, certificate = self._make, self._made, Certificate()
        if make is None:
            yield from [self.example()] * len(self)
            return
        for step in range(self.first_step, len(self)):
            if self._make is not make:
                return
            batch, items = make(step)
            certificate = certificate.add(items)
            made.append(certificate)
            yield batch

    def dataset(self, first_step: int = 0) -> Any:
        """Return a `tf.data.Dataset` as long as an epoch, of examples: Keras counts its batches and looks at their shapes.

        Args:
            first_step: What the epochs of this data set begin with.
        """
        import tensorflow as tf

        # As many examples as steps: no batch goes through it.
        return tf.data.Dataset.from_tensors(self.pack(self.example())).repeat(len(self) - first_step)

    def close(self) -> None:
        """Let go of the data; all ranks call it together."""
        self._make = None
        self._release()

    def pack(self, parts: tuple[Any, ...]) -> Any:
        """Return the arrays (or tensors) of a batch as `(x, y, weight)`."""
        return parts

    @abstractmethod
    def example(self) -> Arrays:
        """Return a batch of the first samples, with weights of 0."""

    @property
    def chunks(self) -> int:
        """What `chunks_read` counts, over all ranks, where everything was fetched once."""
        return self.order.layout.chunks

    @abstractmethod
    def chunks_read(self, epoch: int) -> int | None:
        """Return how many chunks this rank fetched for an epoch; `None` where nobody counts."""

    @abstractmethod
    def _begin(self, epoch: int, first_step: int) -> Make:
        """Get ready for an epoch; return what makes its batches."""

    @abstractmethod
    def _release(self) -> None:
        """Give memory and files back."""


class RowFeed(Feed):
    """Batches of samples that are read row by row: the global batches of an `Order`, cut over the ranks.

    Args:
        source: The samples.
        order: Which samples this rank takes at each step.
        normalizer: Applied to each x batch, `(rows, ...)` to `(rows, ...)`.
        classes: Turn integer labels into `(rows, classes)` float32, or `None`.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        normalizer: Callable[[Any], Any] | None = None,
        classes: int | None = None,
    ) -> None:
        super().__init__(order, source.mode)
        self.source, self._order = source, order
        self.normalizer, self.classes = normalizer, classes
        self.needs_main_thread = source.needs_main_thread

    @property
    def chunks(self) -> int:
        """The chunks that its rows lie in."""
        return self.source.chunks

    def example(self) -> Arrays:
        """Return a batch of the first sample, with weights of 0."""
        x, y = self.source.example(self.order.local_rows)
        return *self._finished(x, y), np.zeros(self.order.local_rows, np.float32)

    def chunks_read(self, epoch: int) -> int | None:
        """Return how many chunks this rank fetched for an epoch."""
        return self.source.chunks_read(epoch)

    def _begin(self, epoch: int, first_step: int) -> Make:
        self.source.begin(epoch, first_step)
        cuts = self._order.epoch(epoch)

        def make(step: int) -> tuple[Arrays, Rows]:
            cut = cuts.cut(step)
            x, y = self._finished(*self.source.read(step, cut))
            return (x, y, cut.weights), cut.rows[: cut.real]

        return make

    def _release(self) -> None:
        self.source.close()

    def _finished(self, x: Array, y: Array) -> tuple[Array, Array]:
        if self.normalizer is not None:
            x = self.normalizer(x)
        if self.classes is not None:
            y = to_categorical(y, self.classes)
        return native(x), native(y)


def native(array: Any) -> Array:
    """Return the array in the machine's byte order, the only one that TensorFlow takes."""
    array = np.asarray(array)
    swapped: Array = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    return swapped
