"""`Sequence`, the base class for batches made in Python, and `MatrixSequence`, which makes them from HDF5 files.

Importing this module imports Keras.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

from hpcutils.data import keras_adapter
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.mixing import WINDOW_BYTES, MixedOrder
from hpcutils.errors import DataError

keras_adapter.adopt()


class Sequence(keras.utils.PyDataset):  # type: ignore[misc]
    """Base class for a data set that is made batch by batch.

    A subclass has `__getitem__(i)`, which returns batch `i` whole (`x`, `(x, y)` or `(x, y, weight)`), and `__len__`, the
    number of batches; it may have `on_epoch_end`, to change the data between epochs. It goes to `fit`, `evaluate` and
    `predict` as `x`. It need not call `super().__init__()`.

    Each batch is made once an epoch, also with workers. Set them on the object: `workers` (default 1),
    `use_multiprocessing` (default `False`: threads) and `max_queue_size` (default 10).

    Example:
        batches = CIFAR10Sequence(paths, labels, 32)
        batches.workers, batches.use_multiprocessing = 4, True
        model.fit(batches, epochs=10)
    """

    def __new__(cls, *args: object, **kwargs: object) -> Sequence:
        """Prepare what Keras keeps on each data set, whether or not the subclass calls `super().__init__()`."""
        self: Sequence = super().__new__(cls)
        keras.utils.PyDataset.__init__(self)
        return self

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must have __getitem__(index), which returns one batch")

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} must have __len__(), the number of batches")


class MatrixSequence(Sequence):
    """Batches of `HDF5Matrix` (and of arrays beside them), read when Keras asks for them: the file may exceed memory.

    Args:
        x: An `HDF5Matrix` or an array, `(samples, …)`, or a list, tuple or dict of them for several inputs.
        y: The same for targets; `None` for `predict`.
        batch_size: Samples of a batch; the last batch of an epoch may be smaller.
        shuffle: Shuffle anew for each epoch: chunks of the file at random, and the samples within windows of about
            64 MiB (a file smaller than that as a whole); see `hpcutils.data.mixing`.
        seed: Non-negative; the same seed gives the same orders.
        sample_weight: `(samples,)`, an array or a matrix, or `None`.

    Raises:
        DataError: The lengths differ.
        ValueError: `batch_size` is smaller than 1.

    Example:
        with HDF5Matrix("train.h5", "x") as x, HDF5Matrix("train.h5", "y") as y:
            model.fit(MatrixSequence(x, y, 64, shuffle=True), epochs=10)
    """

    def __init__(self, x: Any, y: Any, batch_size: int, shuffle: bool = False, seed: int = 0, sample_weight: Any = None) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, got {batch_size}")
        parts = (x,) if y is None else (x, y) if sample_weight is None else (x, y, sample_weight)
        # Tuples all through: TensorFlow would make one tensor of a list.
        self._parts = keras.tree.map_structure(_sliceable, keras.tree.lists_to_tuples(parts))
        self._leaves: list[Any] = keras.tree.flatten(self._parts)
        self._rows = _common_length(self._leaves)
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self._epoch = 0
        self._order = self._new_order()
        self._begun = self._last_was_asked = False

    @property
    def orders_itself(self) -> bool:
        """Whether `fit` must leave the order of the batches alone (see `hpcutils.data.keras_adapter`)."""
        return self.shuffle

    def __len__(self) -> int:
        return math.ceil(self._rows / self.batch_size)

    def __getitem__(self, index: int) -> Any:
        """Return batch `index`: `(x,)`, `(x, y)` or `(x, y, weight)`, in the machine's byte order."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        start = index % len(self) * self.batch_size
        stop = min(start + self.batch_size, self._rows)
        self._last_was_asked |= stop == self._rows
        rows = slice(start, stop) if self._order is None else self._order.take(start, stop)
        return keras.tree.map_structure(lambda part: _native(part[rows]), self._parts)

    def on_epoch_begin(self) -> None:
        """Note that an epoch has begun: Keras calls `on_epoch_end` once before the first, too."""
        self._begun = True

    def on_epoch_end(self) -> None:
        """Take a new order, once the old one has been used up.

        With `steps_per_epoch` Keras calls this before all batches were used, and goes on with the next one: a new order
        at that point would repeat some samples and leave out others. With worker processes the batches are made
        elsewhere, and Keras begins anew each time.
        """
        if self._last_was_asked or (self.use_multiprocessing and self._begun):
            self._epoch += 1
            self._order = self._new_order()
            self._begun = self._last_was_asked = False

    def _new_order(self) -> MixedOrder | None:
        if not self.shuffle:
            return None
        matrices = [part for part in self._leaves if isinstance(part, HDF5Matrix)]
        if not matrices:
            return MixedOrder(self._rows, 1, 0, max(self._rows, 1), self.seed, self._epoch)
        widest = max(matrices, key=lambda matrix: matrix.row_bytes)
        window_rows = max(1, WINDOW_BYTES // max(sum(matrix.row_bytes for matrix in matrices), 1))
        broken = -widest.start % widest.chunk_rows
        return MixedOrder(self._rows, widest.chunk_rows, broken, window_rows, self.seed, self._epoch)


def _sliceable(part: Any) -> Any:
    return part if isinstance(part, HDF5Matrix) else np.asarray(part)


def _common_length(leaves: list[Any]) -> int:
    lengths = [len(leaf) for leaf in leaves]
    if len(set(lengths)) != 1:
        raise DataError(
            f"x, y and sample_weight must have as many samples each, got {', '.join(map(str, lengths))}",
            "give the same start and end to each HDF5Matrix",
        )
    return lengths[0]


def _native(array: Any) -> Any:
    """Return the array in the machine's byte order, the only one that TensorFlow takes."""
    array = np.asarray(array)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
