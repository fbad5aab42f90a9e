"""`HDF5Matrix`: a dataset of an HDF5 file that behaves like a numpy array and is read when it is indexed.

Rows are read by the readers of `hpcutils.data.readers`; inflated chunks are kept in one cache a process for all
matrices together, bounded by the machine's memory (`hpcutils.data.chunks.CACHE`).
"""

from __future__ import annotations

import operator
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, SupportsIndex, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hpcutils.data.arriving import ByteSource
from hpcutils.data.chunks import CACHE
from hpcutils.data.h5file import OPENED, OpenDataset, open_dataset
from hpcutils.data.keys import KeyPlan, Rows, plan_key
from hpcutils.data.readers import Reader
from hpcutils.data.segments import part_of
from hpcutils.errors import DataError

T = TypeVar("T")
Normalizer = Callable[[Any], Any]

# A key that takes part of each row is answered in pieces of this size, so that `x[:, 0]` never holds all of `x`.
PIECE_BYTES = 32 << 20


class CopyWarning(UserWarning):
    """An `HDF5Matrix` is about to be copied into memory as a whole, by something that knows only arrays."""


class HDF5Matrix:
    """A dataset of an HDF5 file in place of a numpy array.

    Every key means what it means for `normalizer(array[start:end])`: integers, slices with any step, lists and arrays of
    row numbers (unsorted, repeated, empty, negative), boolean masks, tuples of these, `...` and `None`. Only the rows
    that a key names are read, each chunk of the file once.

    Each process and each thread may use it: a process opens the file for itself, also after a fork; a pickled matrix
    holds names and numbers, not data. When the file at `datapath` was replaced, the next read takes the new one; its
    rows must have the same shape and type, and there must be enough of them. `close()` lets go of the file; so does
    leaving a `with` block.

    Args:
        datapath: Path of the HDF5 file.
        dataset: Name of the dataset in it, like `"data"` or `"train/images"`; its first axis counts the samples.
        start: First sample; negative counts from the end, as in a slice.
        end: Sample after the last; negative counts from the end; `None` is the end of the data.
        normalizer: Called with each array of rows that is read, `(rows, …)`, always with the batch axis; returns as many
            rows. It must treat each row by itself. It is called in several threads when the matrix is read in several.

    Attributes:
        allow_external: A class attribute; `True` lets files of any origin keep data in other files (external links,
            external storage, virtual datasets). `False`, since such a file can make any file of this host its data.

    Raises:
        DataError: The file or the dataset is missing, not HDF5, without rows, shorter than `start` or `end`, or reads
            other files; or the normalizer changes the number of rows.
        TypeError: `start` or `end` is not an integer.

    Example:
        x = HDF5Matrix("input/file.hdf5", "data")
        model.predict(x)
    """

    allow_external: bool = False
    # Where the bytes come from as long as there is no file at `datapath`.
    _source: ByteSource | None = None

    def __init__(
        self,
        datapath: str | os.PathLike[str],
        dataset: str,
        start: SupportsIndex = 0,
        end: SupportsIndex | None = None,
        normalizer: Normalizer | None = None,
    ) -> None:
        self._closed = False
        self._handle: OpenDataset | None = None
        # Absolute: a worker process may have another current folder.
        self.datapath = os.path.abspath(os.fspath(datapath))  # noqa: PTH100 - resolves no links, unlike pathlib
        self.dataset = dataset
        self.normalizer = normalizer
        self._handle = open_dataset(self.datapath, self.dataset, self.allow_external, self._source)
        reader = self._handle.reader
        self.start, self.end = self._bounds(start, end, reader.shape[0])
        self._file_rows = reader.shape[1:], reader.dtype
        self.chunk_rows = reader.block_rows
        self.segments = part_of(reader.segments, self.start, self.end)
        self._row_shape, self.dtype = self._probe(reader)

    @classmethod
    def trusting(
        cls,
        datapath: str | os.PathLike[str],
        dataset: str,
        start: SupportsIndex = 0,
        end: SupportsIndex | None = None,
        normalizer: Normalizer | None = None,
    ) -> HDF5Matrix:
        """Make a matrix that may read the other files that this one names: external links, external storage, views."""
        matrix = cls.__new__(cls)
        matrix.allow_external = True
        matrix.__init__(datapath, dataset, start, end, normalizer)  # type: ignore[misc]
        return matrix

    @classmethod
    def arriving(
        cls,
        source: ByteSource,
        datapath: str | os.PathLike[str],
        dataset: str,
        start: SupportsIndex = 0,
        end: SupportsIndex | None = None,
        normalizer: Normalizer | None = None,
    ) -> HDF5Matrix:
        """Make a matrix of a file that will be at `datapath`: until it is, its bytes come from `source`.

        The first read after the file appeared takes the file. A matrix that is pickled meanwhile leaves its source behind.
        """
        matrix = cls.__new__(cls)
        matrix._source = source
        matrix.__init__(datapath, dataset, start, end, normalizer)  # type: ignore[misc]
        return matrix

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape after the normalizer, samples first."""
        return (len(self), *self._row_shape)

    @property
    def ndim(self) -> int:
        """Number of axes after the normalizer."""
        return 1 + len(self._row_shape)

    @property
    def size(self) -> int:
        """Number of elements after the normalizer."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes that all rows would take in memory after the normalizer."""
        return self.size * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as the file has it, before the normalizer, inflated."""
        shape, dtype = self._file_rows
        return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize

    @property
    def chunks(self) -> tuple[int, ...]:
        """`(rows, …)` that are cheapest read together: the chunk's rows, or a piece of about 1 MiB, and the row's shape."""
        return (self.chunk_rows, *self._file_rows[0])

    def __len__(self) -> int:
        return self.end - self.start

    def __repr__(self) -> str:
        return f"<HDF5Matrix {self.dataset!r} of {self.datapath!r} [{self.start}:{self.end}], {self.shape} {self.dtype}>"

    def __getitem__(self, key: Any) -> Any:
        # A batch or a row: by far the commonest keys, and worth the way around the planning.
        if type(key) is slice:
            first, stop, step = key.indices(self.end - self.start)
            return self._neighbours(first, stop) if step == 1 else self._fetch(range(first, stop, step))
        if type(key) is int and 0 <= key < self.end - self.start:
            return self._neighbours(key, key + 1)[0]
        plan = plan_key(key, self.shape)
        if plan.key is None:
            return self._fetch(plan.rows)
        shape = plan.answer_shape(self._row_shape)
        if plan.row_axis is not None and len(plan.rows) * self._one_row_bytes() > PIECE_BYTES:
            return self._fetch_pieces(plan, shape, plan.row_axis)
        rows = self._fetch(plan.rows)
        answer = rows[plan.key]
        # A view of a small part would keep all of the rows in memory.
        return answer.copy() if isinstance(answer, np.ndarray) and 2 * answer.nbytes < rows.nbytes else answer

    def read_rows(self, rows: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Return the rows with these numbers, in this order.

        Args:
            rows: `(n,)` integers, unsorted and repeated as you like; negative ones count from the end.

        Returns:
            `(n, *shape[1:])`, a new array.

        Raises:
            IndexError: A row number is out of range, or not an integer.
            DataError: The file cannot be read.
        """
        rows = np.asarray(rows)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise IndexError(f"read_rows takes a 1-D array of integers, got shape {rows.shape}, type {rows.dtype}")
        return self._fetch(plan_key(rows.astype(np.intp), self.shape).rows)

    def read_into(self, first: int, out: NDArray[Any]) -> int:
        """Fill `out` with neighbouring rows as the file has them: no normalizer, no cache, in this thread.

        Args:
            first: The first row, from 0.
            out: `(n, *row shape)` of the dataset's own type, C-contiguous.

        Returns:
            How many chunks were fetched for it.

        Raises:
            IndexError: The rows are not all there, or `out` does not fit.
            DataError: The file cannot be read.
        """
        if not 0 <= first <= first + len(out) <= len(self) or (out.shape[1:], out.dtype) != self._file_rows:
            raise IndexError(f"{len(out)} rows from {first} on into {out.shape} {out.dtype}: {self!r} has rows {self._file_rows}")
        return self._read(lambda reader: reader.read_into(self.start + first, out))

    @property
    def __array__(self) -> Callable[..., NDArray[Any]]:
        """numpy's protocol: copies all rows into memory, with a `CopyWarning` that says how much.

        A property because Keras asks whether it is there just before it chooses how to read an array. That is the
        moment to tell Keras how to read this one batch by batch (see `hpcutils.data.keras_adapter`).
        """
        if "keras.src.trainers.data_adapters" in sys.modules:
            from hpcutils.data.keras_adapter import adopt

            adopt()
        return self._to_array

    def close(self) -> None:
        """Let go of the file and of its chunks in the cache. Reading afterwards is an error; closing again is not."""
        self._closed = True
        handle, self._handle = self._handle, None
        if handle is not None and handle.is_ours():
            with OPENED.lock:
                handle.shut()
            CACHE.drop(handle.token)

    def __enter__(self) -> HDF5Matrix:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_source": None}

    def _to_array(self, dtype: DTypeLike = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError(f"{self!r} cannot become an array without a copy")
        warnings.warn(
            f"copying all of {self!r} into memory: {self.nbytes / 2**20:.1f} MiB ({self.nbytes} bytes). For Keras, pair "
            "matrices with hpcutils.data.sequence.MatrixSequence, and split with start= and end= instead of "
            "validation_split. If the copy is meant, x[:] makes it without this warning.",
            CopyWarning,
            stacklevel=2,
        )
        return np.asarray(self[:], dtype)

    def _bounds(self, start: SupportsIndex, end: SupportsIndex | None, rows: int) -> tuple[int, int]:
        """Return start and end as row numbers of the file, `0 <= start <= end <= rows`."""
        first, last = operator.index(start), rows if end is None else operator.index(end)
        for name, value in (("start", first), ("end", last)):
            if not -rows <= value <= rows:
                message = f"{self.datapath}: {name}={value} is outside of dataset {self.dataset!r}, which has {rows} rows"
                raise DataError(message, f"give {name} from {-rows} to {rows}")
        first, last = (value + rows if value < 0 else value for value in (first, last))
        return first, max(first, last)

    def _probe(self, reader: Reader) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and type of a row after the normalizer, from one row of the file at most."""
        if self.normalizer is None:
            return reader.shape[1:], reader.dtype
        first = min(self.start, max(reader.shape[0] - 1, 0))
        row = reader.read(range(first, min(first + 1, reader.shape[0])))
        result = self._normalized(row, len(row))
        return result.shape[1:], result.dtype

    def _open(self) -> OpenDataset:
        """Return a handle that belongs to this process and to the file as it is now."""
        if self._closed:
            raise DataError(f"{self!r} is closed", "read it before close(), or inside of the with block; or make a new one")
        handle = self._handle
        if handle is None or not handle.is_current(self.datapath):
            handle = self._handle = open_dataset(self.datapath, self.dataset, self.allow_external, self._source)
            self._refuse_other_rows(handle.reader)
            if self._closed:  # by another thread, which may not have seen this handle
                self.close()
                return self._open()
        return handle

    def _read(self, call: Callable[[Reader], T]) -> T:
        """Return `call(reader)`; anew when another thread closed the file under it, because it changed or by `close()`."""
        while True:
            handle = self._open()
            try:
                return call(handle.reader)
            except DataError:
                if not handle.was_shut():
                    raise

    def _refuse_other_rows(self, reader: Reader) -> None:
        """Raise when the file has other rows than those that this matrix stands for."""
        if (reader.shape[1:], reader.dtype) != self._file_rows or reader.shape[0] < self.end:
            self._handle = None
            shape, dtype = self._file_rows
            raise DataError(
                f"{self.datapath}: dataset {self.dataset!r} was replaced: it is {reader.shape} {reader.dtype} now, and was "
                f"at least {(self.end, *shape)} {dtype}",
                "make a new HDF5Matrix for the new data",
            )

    def _neighbours(self, first: int, stop: int) -> NDArray[Any]:
        """Return the rows from `first` up to `stop` of this part of the dataset, normalized."""
        if stop <= first:
            return np.empty((0, *self._row_shape), self.dtype)
        while True:  # as in `_read`, without its calls
            handle = self._open()
            try:
                rows = handle.reader.read_range(self.start + first, self.start + stop)
            except DataError:
                if not handle.was_shut():
                    raise
            else:
                return rows if self.normalizer is None else self._normalized(rows, stop - first)

    def _fetch(self, rows: Rows) -> NDArray[Any]:
        """Return rows of this part of the dataset, normalized: `(len(rows), *row_shape)`."""
        if len(rows) == 0:
            return np.empty((0, *self._row_shape), self.dtype)
        if isinstance(rows, range):
            shifted: Rows = range(rows.start + self.start, rows.stop + self.start, rows.step)
        else:
            shifted = rows + self.start
        return self._normalized(self._read(lambda reader: reader.read(shifted)), len(rows))

    def _fetch_pieces(self, plan: KeyPlan, shape: tuple[int, ...], axis: int) -> NDArray[Any]:
        """Answer a key whose rows lie along `axis`, some rows at a time."""
        out = np.empty(shape, self.dtype)
        step = max(1, PIECE_BYTES // self._one_row_bytes())
        for first in range(0, len(plan.rows), step):
            rows = plan.rows[first : first + step]
            out[(*[slice(None)] * axis, slice(first, first + len(rows)))] = self._fetch(rows)[plan.key]
        return out

    def _one_row_bytes(self) -> int:
        return max(self.row_bytes, self.nbytes // max(len(self), 1), 1)

    def _normalized(self, rows: NDArray[Any], count: int) -> NDArray[Any]:
        if self.normalizer is None:
            return rows
        result = np.asarray(self.normalizer(rows))
        if result.shape[:1] != (count,):
            raise DataError(
                f"{self.datapath}: the normalizer of dataset {self.dataset!r} made shape {result.shape} of {rows.shape}",
                "it must return as many rows as it is given, along the first axis",
            )
        return result
