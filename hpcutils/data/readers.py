"""Three ways to read rows of an HDF5 dataset; `choose_reader` picks the fastest that the dataset allows.

    StoredReader      rows that lie in the file as they are, in one block or in chunks without filters: `preadv`
    ChunkReader       chunks with deflate, zstd, lz4, blosc, shuffle: stored bytes from HDF5, filters undone in `chunks`
    LibraryReader     anything else (other filters, strings, compounds, virtual datasets): HDF5 itself, chunk by chunk

Where the file is still arriving, the bytes of all three come from a `ByteSource`: HDF5 itself has it as its file.

All give a new array of the dataset's own dtype, rows in the order asked for, and visit each chunk once a request.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias

import h5py
import numpy as np
from h5py._objects import phil
from numpy.typing import NDArray

from hpcutils.data.arriving import ByteSource, ChunkPlaces, places_of
from hpcutils.data.chunks import (
    CACHE,
    CACHE_LEAST_BYTES,
    SHUFFLE,
    WORKERS,
    Inflated,
    copy_rows,
    is_known,
    take_rows,
    undo_filters,
)
from hpcutils.data.codecs import need_filters
from hpcutils.data.keys import Group, Rows, group_rows, split_runs
from hpcutils.data.segments import Segment
from hpcutils.data.stored import PIECE_BYTES, OwnDescriptor, StoredReader, name_of, stored_blocks
from hpcutils.errors import DataError

# The array to fill, the rows of one chunk, and where that chunk starts along the axes after the first.
Job: TypeAlias = tuple[NDArray[Any], Group, tuple[int, ...]]
# Names one dataset in one state of one file, for the cache.
Token: TypeAlias = tuple[int | str, ...]

# What h5py raises when HDF5 cannot read; ValueError when another thread closed the file.
READ_ERRORS = (OSError, RuntimeError, ValueError)
# Of a chunk larger than this only the wanted rows are read: eight such chunks fill the smallest cache.
HELD_BYTES = CACHE_LEAST_BYTES // 8


class Reader(Protocol):
    """What `HDF5Matrix` asks of a dataset. `block_rows` are the rows that are cheapest read together; `segments` is all rows."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    block_rows: int
    segments: tuple[Segment, ...]

    def read(self, rows: Rows) -> NDArray[Any]:
        """Return `(len(rows), *shape[1:])`; rows lie in range, in any order, and may repeat."""

    def read_range(self, first: int, stop: int) -> NDArray[Any]:
        """Return the rows from `first` up to `stop`, which is larger: `read` for the commonest request."""

    def read_into(self, first: int, out: NDArray[Any]) -> int:
        """Fill `out`, `(rows, *shape[1:])`, from row `first` on, in this thread and past the cache; return the chunks fetched."""


def choose_reader(file: h5py.File, dataset: h5py.Dataset, token: Token, source: ByteSource | None = None) -> Reader:
    """Return the fastest reader that can read `dataset`; `source` is where the file's bytes come from, if not from a path."""
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(i) for i in range(plist.get_nfilters())]
    # A file that is also open for writing in this process may have rows that are not in the file yet.
    if not _is_plain(dataset) or file.id.get_intent() != h5py.h5f.ACC_RDONLY:
        return LibraryReader(dataset, token)
    has_bytes = source is not None or file.driver == "sec2"
    blocks = stored_blocks(dataset, plist) if has_bytes and not filters else None
    if blocks is not None:
        return StoredReader(dataset, blocks, OwnDescriptor(file) if source is None else source)
    if dataset.chunks and is_known(tuple(code for code, *_ in filters)) and _shuffles_elements(filters, dataset):
        return ChunkReader(dataset, tuple(code for code, *_ in filters), token, places_of(file, dataset, source))
    return LibraryReader(dataset, token)


def _is_plain(dataset: h5py.Dataset) -> bool:
    """Tell whether the bytes in the file are the bytes of the array: numbers of a size and layout that numpy has, too."""
    dtype = dataset.dtype
    plain = dtype.kind in "iufb" and dtype.itemsize in (1, 2, 4, 8) and dtype.subdtype is None
    return plain and bool(dataset.shape) and dataset.id.get_type().equal(h5py.h5t.py_create(dtype, logical=True))


def _shuffles_elements(filters: list[Any], dataset: h5py.Dataset) -> bool:
    return all(values[0] == dataset.dtype.itemsize for code, _, values, _ in filters if code == SHUFFLE)


class ChunkReader:
    """Reads a chunked dataset of plain numbers, unfiltered, shuffled, or compressed in one of the known ways."""

    def __init__(self, dataset: h5py.Dataset, pipeline: tuple[int, ...], token: Token, places: ChunkPlaces | None = None) -> None:
        self.shape, self.dtype = dataset.shape, dataset.dtype
        self.block_rows = dataset.chunks[0]
        self._dataset, self._pipeline, self._token, self._places = dataset, pipeline, token, places
        self._name = name_of(dataset)
        self._chunks: tuple[int, ...] = dataset.chunks
        self._corner = (0,) * len(self._chunks[1:])
        self._size_bytes = int(np.prod(self._chunks, dtype=np.int64)) * self.dtype.itemsize
        columns = math.prod(-(-n // c) for n, c in zip(self.shape[1:], self._chunks[1:], strict=True))
        self.segments: tuple[Segment, ...] = (Segment(self.shape[0], self.block_rows, columns=columns),)

    def read(self, rows: Rows) -> NDArray[Any]:
        """Return the rows, each chunk fetched and inflated once."""
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if out.size == 0:
            return out
        jobs = self._jobs(out, rows)
        # Chunks in the cache take a few microseconds each: only the others are worth a thread.
        for _ in WORKERS.map(self._place, [job for job in jobs if not self._place_cached(job)]):
            pass
        return out

    def read_range(self, first: int, stop: int) -> NDArray[Any]:
        """Return the rows from `first` up to `stop`."""
        if not self._pipeline and self._places is None:
            # Nothing to undo: HDF5 reads straight into the array.
            return library_read(self._dataset, slice(first, stop), self._name)
        local = first % self.block_rows
        if stop - first + local <= self.block_rows and self._chunks[1:] == self.shape[1:]:
            chunk = CACHE.get((self._token, (first - local, *self._corner)))
            if chunk is not None:
                out = np.empty((stop - first, *self.shape[1:]), self.dtype)
                copy_rows(chunk, self._chunks, slice(local, local + stop - first), out)
                return out
        return self.read(range(first, stop))

    def read_into(self, first: int, out: NDArray[Any]) -> int:
        """Fill `out` from row `first` on; return the chunks fetched."""
        jobs = self._jobs(out, range(first, first + len(out)))
        for job in jobs:
            self._copy(self._fetch(self._start(job)), job)
        return len(jobs)

    def _jobs(self, out: NDArray[Any], rows: Rows) -> list[Job]:
        # Where the chunks start along the axes after the first: one column when a chunk holds whole rows.
        columns = list(itertools.product(*(range(0, n, c) for n, c in zip(self.shape[1:], self._chunks[1:], strict=True))))
        return [(out, group, column) for group in group_rows(rows, self.block_rows) for column in columns]

    def _place_cached(self, job: Job) -> bool:
        """Put one chunk's rows in place if the cache has the chunk."""
        chunk = CACHE.get((self._token, self._start(job)))
        if chunk is not None:
            self._copy(chunk, job)
        return chunk is not None

    def _place(self, job: Job) -> None:
        """Fetch a chunk, put its wanted rows in place, and keep it when it has more rows than those."""
        start = self._start(job)
        chunk = self._fetch(start)
        self._copy(chunk, job)
        if chunk is None:
            return
        wanted = job[1].local
        whole = isinstance(wanted, slice) and wanted == slice(0, min(self.block_rows, self.shape[0] - start[0]))
        if not whole:
            CACHE.put((self._token, start), chunk, self._size_bytes)

    def _fetch(self, start: tuple[int, ...]) -> Inflated | None:
        """Return a chunk with its filters undone; `None` where only HDF5 can make it."""
        found = self._places.read(start) if self._places is not None else self._stored(start)
        if found is None:
            return None
        mask, stored = found
        with _at(self._name, start):
            return undo_filters(stored, self._pipeline, mask, self._size_bytes)

    def _stored(self, start: tuple[int, ...]) -> tuple[int, bytes] | None:
        """Return a chunk's filter mask and its bytes in the file."""
        try:
            with phil:  # h5py before 3.16 forgets its own lock here (h5py#2764): two threads crash the process
                mask, stored = self._dataset.id.read_direct_chunk(start)
        except READ_ERRORS:
            # A chunk that was never written has no bytes to give; HDF5 itself makes up its fill values, or explains.
            return None
        return mask, stored

    def _copy(self, chunk: Inflated | None, job: Job) -> None:
        """Copy the wanted rows of one chunk to their places; `None` is a chunk that only HDF5 can make."""
        out, group, column = job
        sizes = [min(c, n - first) for first, n, c in zip(column, self.shape[1:], self._chunks[1:], strict=True)]
        cells = tuple(slice(first, first + size) for first, size in zip(column, sizes, strict=True))
        if chunk is not None and isinstance(group.local, slice) and isinstance(group.place, slice):
            copy_rows(chunk, self._chunks, group.local, out[(group.place, *cells)])
            return
        if chunk is not None:
            # (wanted rows, *chunk columns); a chunk at the border reaches past the data.
            rows = take_rows(chunk, self._chunks, self.dtype, group.local)[(slice(None), *map(slice, sizes))]
        else:
            first_row = group.chunk * self.block_rows
            last_row = min(first_row + self.block_rows, self.shape[0])
            rows = library_read(self._dataset, (slice(first_row, last_row), *cells), self._name)[group.local]
        out[(group.place, *cells)] = rows

    def _start(self, job: Job) -> tuple[int, ...]:
        _, group, column = job
        return (group.chunk * self.block_rows, *column)


class LibraryReader:
    """Reads any dataset through h5py, whole chunks at a time where rows are scattered."""

    def __init__(self, dataset: h5py.Dataset, token: Token) -> None:
        need_filters(dataset)
        self._name = name_of(dataset)
        empty = library_read(dataset, slice(0, 0), self._name)
        # Array types put their axes behind the dataset's own: only a read tells.
        self.shape, self.dtype = (dataset.shape[0], *empty.shape[1:]), empty.dtype
        self._dataset, self._token = dataset, token
        self._row_bytes = max(1, int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize)
        self.block_rows = dataset.chunks[0] if dataset.chunks else max(1, PIECE_BYTES // self._row_bytes)
        self.segments: tuple[Segment, ...] = (Segment(self.shape[0], self.block_rows, chunked=bool(dataset.chunks)),)
        self._keeps = bool(dataset.chunks) and not self.dtype.hasobject

    def read(self, rows: Rows) -> NDArray[Any]:
        """Return the rows; for scattered ones each chunk is read once, unless it is too large to hold."""
        if isinstance(rows, range) and rows.step == 1:
            return self.read_range(rows.start, rows.stop)
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for group in group_rows(rows, self.block_rows):
            self._place(out, group)
        return out

    def read_range(self, first: int, stop: int) -> NDArray[Any]:
        """Return the rows from `first` up to `stop`."""
        return library_read(self._dataset, slice(first, stop), self._name)

    def read_into(self, first: int, out: NDArray[Any]) -> int:
        """Fill `out` from row `first` on; return the chunks that this touched."""
        out[...] = library_read(self._dataset, slice(first, first + len(out)), self._name)
        return (first + len(out) - 1) // self.block_rows - first // self.block_rows + 1 if len(out) else 0

    def _place(self, out: NDArray[Any], group: Group) -> None:
        first = group.chunk * self.block_rows
        stop = min(first + self.block_rows, self.shape[0])
        if (stop - first) * self._row_bytes > HELD_BYTES:
            self._place_runs(out, group, first)
            return
        block = CACHE.get((self._token, first))
        if block is None:
            block = library_read(self._dataset, slice(first, stop), self._name)
            if self._keeps:
                CACHE.put((self._token, first), block, block.nbytes)
        out[group.place] = block[group.local]

    def _place_runs(self, out: NDArray[Any], group: Group, first: int) -> None:
        """Read only the wanted rows of a chunk that is too large to hold."""
        local = np.arange(self.block_rows)[group.local] if isinstance(group.local, slice) else group.local
        places = np.arange(len(out))[group.place] if isinstance(group.place, slice) else group.place
        max_rows = max(1, HELD_BYTES // self._row_bytes)
        for low, high in split_runs(local, 0, max_rows):
            start, stop = int(local[low]), int(local[high - 1]) + 1
            block = library_read(self._dataset, slice(first + start, first + stop), self._name)
            out[places[low:high]] = block[local[low:high] - start]


def library_read(dataset: h5py.Dataset, key: Any, name: str) -> NDArray[Any]:
    """Return `dataset[key]`, with HDF5's complaint as a `DataError` that begins with `name`."""
    try:
        with phil:  # strings of variable length crash without it when two threads read (h5py#2920)
            return np.asarray(dataset[key])
    except READ_ERRORS as exc:
        raise DataError(f"{name}: cannot be read: {exc}", "the file is damaged, or a filter is missing") from exc


@contextlib.contextmanager
def _at(name: str, start: tuple[int, ...]) -> Iterator[None]:
    """Say where in which file a damaged chunk is."""
    try:
        yield
    except DataError as exc:
        raise DataError(f"{name}, chunk at {start}: {exc.message}", "copy the file again, or write it anew") from exc
