"""Runs of rows with chunks of one size, and the common borders of several datasets. Arithmetic only, no I/O.

A dataset of one file is one segment. Several files, or a virtual dataset over several, are a segment each: chunks begin anew there.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hpcutils.data import shards
from hpcutils.data.layout import Layout
from hpcutils.data.scramble import Ints

# Common borders lie so close that the pool holds a piece of each of so many shards, of all datasets together.
LEAST_SHARDS = 24
# Borders that `times_fetched` looks at.
MOST_BORDERS = 1 << 18


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows of a dataset whose chunks are all of one size.

    Args:
        rows: How many.
        chunk_rows: Rows of a chunk; of a piece that is cheap to read at once, where there are no chunks.
        first: Row of its own dataset at which it begins, which may be inside of a chunk.
        columns: Chunks beside each other, where a chunk holds a part of each row.
        chunked: `False` where a read may begin at any row at no cost.
    """

    rows: int
    chunk_rows: int
    first: int = 0
    columns: int = 1
    chunked: bool = True

    @property
    def chunks(self) -> int:
        """Number of chunks that it touches."""
        return -(-(self.first % self.chunk_rows + self.rows) // self.chunk_rows) * self.columns if self.rows else 0


class Edges:
    """Rows of several parts, one part after the other.

    Args:
        sizes: Rows of each part.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._edges = [0, *itertools.accumulate(sizes)]

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return self._edges[-1]

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (part, its first row, low, high) for each part that has rows `low` to `high` of the `count` from `first` on."""
        done, number = 0, bisect_right(self._edges, first) - 1
        while done < count:
            start = first + done - self._edges[number]
            rows = min(self._edges[number + 1] - self._edges[number] - start, count - done)
            if rows > 0:
                yield number, start, done, done + rows
            done, number = done + rows, number + 1

    def owners(self, rows: NDArray[np.intp]) -> Iterator[tuple[int, NDArray[np.intp], NDArray[np.intp]]]:
        """Yield (part, places in `rows`, rows of the part) for each part that has some of `rows`."""
        numbers = np.searchsorted(self._edges, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            yield number, places, rows[places] - self._edges[number]


class Matrix(Protocol):
    """What the data path asks of a dataset: `HDF5Matrix`, or several of them as one (`JoinedMatrix`)."""

    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Samples first."""

    @property
    def nbytes(self) -> int:
        """Bytes of all rows in memory."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """How the rows lie in chunks."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice) -> NDArray[Any]:
        """Return neighbouring rows, inflated in several threads."""

    def read_rows(self, rows: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Return the rows with these numbers, in this order."""

    def read_into(self, first: int, out: NDArray[Any]) -> int:
        """Fill `out` from row `first` on, in this thread and past the cache; return the chunks fetched."""

    def close(self) -> None:
        """Let go of the files."""


def part_of(segments: Sequence[Segment], start: int, stop: int) -> tuple[Segment, ...]:
    """Return what lies between two rows."""
    found, before = [], 0
    for segment in segments:
        low, high = max(start - before, 0), min(stop - before, segment.rows)
        if low < high:
            found.append(replace(segment, rows=high - low, first=segment.first + low))
        before += segment.rows
    return tuple(found)


def count_chunks(segments: Sequence[Segment]) -> int:
    """Return the number of chunks that must be fetched for all rows."""
    return sum(segment.chunks for segment in segments)


def is_chunked(matrix: Matrix) -> bool:
    """Tell whether it matters where a read of a dataset begins."""
    return any(segment.chunked for segment in matrix.segments)


def chunk_rows_of(matrix: Matrix) -> int:
    """Return the rows of the largest chunk of a dataset; of a piece, where it has none."""
    return max((s.chunk_rows for s in matrix.segments if s.chunked == is_chunked(matrix)), default=1)


def layout_of(*matrices: Matrix) -> Layout:
    """Return how the samples of some datasets of the same length lie in chunks, by the borders that all have in common, if any.

    It follows from the files alone, never from the machine: it decides the order.

    Args:
        matrices: The samples first; then what is read with them.
    """
    row_bytes = sum(matrix.row_bytes for matrix in matrices)
    rows = _common_rows(matrices, row_bytes)
    chunked = [matrix for matrix in matrices if is_chunked(matrix) and rows % chunk_rows_of(matrix) == 0]
    # The borders of the largest chunks: those of smaller ones lie among them.
    anchor = max(chunked, key=chunk_rows_of, default=matrices[0])
    edges = np.cumsum([0, *(segment.rows for segment in anchor.segments)]).tolist()
    firsts = [-segment.first % rows for segment in anchor.segments] or [0]
    breaks = tuple(zip(edges[1:-1], firsts[1:], strict=True))
    return Layout(len(matrices[0]), rows, firsts[0], matrices[0].row_bytes, breaks)


def _common_rows(matrices: Sequence[Matrix], row_bytes: int) -> int:
    """Return the rows between two borders: a multiple of each chunk's, as far as the pool has room for pieces of that size."""
    most = shards.POOL_BYTES // LEAST_SHARDS // max(row_bytes, 1)
    rows = chunk_rows_of(matrices[0]) if is_chunked(matrices[0]) else 1
    for chunk_rows in sorted({s.chunk_rows for matrix in matrices for s in matrix.segments if s.chunked}):
        common = math.lcm(rows, chunk_rows)
        if common == rows or common <= most:
            rows = common
        elif rows < chunk_rows <= most:
            rows = chunk_rows
    if is_chunked(matrices[0]):
        return rows
    piece = chunk_rows_of(matrices[0])
    return rows * max(1, piece // rows)


def times_fetched(layout: Layout, matrix: Matrix) -> float:
    """Return how often the chunks of a dataset are fetched when it is read along the borders of `layout`: 1, or more.

    An estimate where there are very many borders: some of them stand for all.
    """
    chunks = count_chunks(matrix.segments)
    if chunks == 0 or not is_chunked(matrix):
        return 1.0
    step = -(-layout.chunks // MOST_BORDERS)
    cut = int(_columns_cut(matrix.segments, layout.starts(np.arange(0, layout.chunks, step, dtype=np.int64))).sum())
    return 1.0 + float(cut) * step / chunks


def _columns_cut(segments: Sequence[Segment], borders: Ints) -> Ints:
    """Return, for each border, how many chunks it cuts in two."""
    edges = np.cumsum([0, *(segment.rows for segment in segments)])
    rows, first, columns = (
        np.array([getattr(segment, name) for segment in segments]) for name in ("chunk_rows", "first", "columns")
    )
    chunked = np.array([segment.chunked for segment in segments])
    part = np.clip(np.searchsorted(edges, borders, side="right") - 1, 0, len(segments) - 1)
    within = borders - edges[part]
    inside = (within > 0) & ((within + first[part]) % rows[part] != 0) & chunked[part]
    return np.asarray(np.where(inside, columns[part], 0))
