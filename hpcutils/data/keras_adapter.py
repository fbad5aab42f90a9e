"""How `fit(x, y)`, `evaluate(x, y)` and `predict(x)` read an `HDF5Matrix` batch by batch.

Keras 3 makes one array, and one tensor, of anything that has `__array__`. It chooses how to read its arguments in
`keras.src.trainers.data_adapters.get_data_adapter`, which makes an `ArrayDataAdapter` of arrays and a `PyDatasetAdapter` of
data sets written in Python. `adopt` puts a subclass in the place of each:

    ArrayDataAdapter   steps aside for the other when a matrix is among the arguments
    PyDatasetAdapter   takes the batches of a data set that says `orders_itself` in their own order, also under the
                       default `fit(shuffle=True)`, which would otherwise hop through the file from batch to batch

and changes nothing for other data. These names are not part of Keras' documented interface. Where they are missing or take
other arguments, nothing is replaced: Keras then copies the matrix, and the matrix warns (`CopyWarning`). `MatrixSequence`
needs none of this, only `fit(shuffle=False)`. `validation_split`, `train_on_batch` and `keras.ops` copy in any case.
"""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import numpy as np

from hpcutils.data.hdf5 import HDF5Matrix

ADAPTERS = "keras.src.trainers.data_adapters"
ARRAY_ARGUMENTS = {"x", "y", "sample_weight", "batch_size", "steps", "shuffle", "class_weight"}
DATASET_ARGUMENTS = {"x", "class_weight", "shuffle"}


def adopt() -> bool:
    """Teach the imported Keras to read matrices batch by batch; return whether it does."""
    adapters: Any = sys.modules.get(ADAPTERS)
    arrays, datasets = (getattr(adapters, name, None) for name in ("ArrayDataAdapter", "PyDatasetAdapter"))
    if getattr(arrays, "reads_matrices", False):
        return True
    if not _takes(arrays, ARRAY_ARGUMENTS) or not _takes(datasets, DATASET_ARGUMENTS):
        return False
    adapters.PyDatasetAdapter = _dataset_adapter(datasets)
    adapters.ArrayDataAdapter = _array_adapter(arrays, adapters.PyDatasetAdapter)
    return True


def _takes(adapter: Any, arguments: set[str]) -> bool:
    return inspect.isclass(adapter) and set(inspect.signature(adapter).parameters) >= arguments


def _dataset_adapter(datasets: Any) -> Any:
    """Return a subclass of Keras' `PyDatasetAdapter` that leaves the order to data sets that have one."""

    class OrderedDatasetAdapter(datasets):  # type: ignore[misc]
        def __init__(self, x: Any, class_weight: Any = None, shuffle: bool = False) -> None:
            super().__init__(x, class_weight=class_weight, shuffle=shuffle and not getattr(x, "orders_itself", False))

    return OrderedDatasetAdapter


def _array_adapter(arrays: Any, datasets: Any) -> Any:
    """Return a subclass of Keras' `ArrayDataAdapter` that hands matrices to its `PyDatasetAdapter`."""

    class MatrixAwareAdapter(arrays):  # type: ignore[misc]
        reads_matrices = True

        def __new__(
            cls,
            x: Any,
            y: Any = None,
            sample_weight: Any = None,
            batch_size: int | None = None,
            steps: int | None = None,
            shuffle: bool | str = False,
            class_weight: Any = None,
        ) -> Any:
            if not _holds_matrix((x, y, sample_weight)):
                return super().__new__(cls)
            sequence = _sequence(x, y, sample_weight, batch_size, steps, shuffle is True)
            # 'batch' was the old Keras' way with HDF5 files: whole batches change places, their samples do not.
            return datasets(sequence, class_weight=class_weight, shuffle=shuffle == "batch")

    return MatrixAwareAdapter


def _sequence(x: Any, y: Any, sample_weight: Any, batch_size: int | None, steps: int | None, shuffle: bool) -> Any:
    """Return the batches that `fit(x, y, sample_weight, batch_size, steps_per_epoch=steps)` asks for."""
    from hpcutils.data.sequence import MatrixSequence

    if not batch_size:
        # As Keras does for arrays.
        batch_size = math.ceil(_length(x) / steps) if steps else 32
    # From numpy's global generator, so that keras.utils.set_random_seed decides.
    seed = int(np.random.randint(1 << 31)) if shuffle else 0
    return MatrixSequence(x, y, batch_size, shuffle, seed, sample_weight)


def _length(x: Any) -> int:
    while not hasattr(x, "shape"):
        x = next(iter(x.values() if isinstance(x, dict) else x))
    return int(x.shape[0])


def _holds_matrix(value: Any) -> bool:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        return any(map(_holds_matrix, value))
    return isinstance(value, HDF5Matrix)
