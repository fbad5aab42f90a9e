"""`JoinedMatrix`: datasets of several files, one after the other, as one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.segments import Edges, Segment
from hpcutils.errors import DataError

# Opens a part of a dataset: path, name, start, end.
Open = Callable[[str, str, int, int | None], HDF5Matrix]


class JoinedMatrix:
    """Rows of several datasets, one after the other: what the data path needs of an `HDF5Matrix`, without a normalizer.

    Processes and threads may share it, as they may share an `HDF5Matrix`.

    Args:
        parts: The datasets, whole or in part; all with the same type and shape of a row.

    Raises:
        DataError: They do not fit together.
    """

    def __init__(self, parts: Sequence[HDF5Matrix]) -> None:
        self.parts = tuple(parts)
        first = self.parts[0]
        self.dtype = first.dtype
        for part in self.parts[1:]:
            if (part.shape[1:], part.dtype) != (first.shape[1:], first.dtype):
                raise DataError(
                    f"rows of {part.shape[1:]} {part.dtype} in {_name(part)} cannot follow rows of {first.shape[1:]} {first.dtype} "
                    f"in {_name(first)}",
                    "the datasets of a list must have rows of the same shape and type",
                )
        self._edges = Edges([len(part) for part in self.parts])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of all rows, samples first."""
        return (len(self), *self.parts[0].shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes that all rows would take in memory."""
        return sum(part.nbytes for part in self.parts)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.parts[0].row_bytes

    @property
    def segments(self) -> tuple[Segment, ...]:
        """How the rows lie in chunks, file after file."""
        return tuple(segment for part in self.parts for segment in part.segments)

    def __len__(self) -> int:
        return self._edges.rows

    def __repr__(self) -> str:
        return f"<JoinedMatrix of {', '.join(map(_name, self.parts))}, {self.shape} {self.dtype}>"

    def __getitem__(self, key: slice) -> NDArray[Any]:
        """Return neighbouring rows: a new array."""
        rows = range(len(self))[key]
        if rows.step != 1:
            raise IndexError(f"a slice without a step was expected, got {key}")
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for number, first, low, high in self._edges.pieces(rows.start, len(rows)):
            out[low:high] = self.parts[number][first : first + high - low]
        return out

    def read_rows(self, rows: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Return the rows with these numbers, in this order; see `HDF5Matrix.read_rows`."""
        rows = np.asarray(rows)
        if rows.size and not -len(self) <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows from {rows.min()} to {rows.max()} of {self!r}")
        wanted = rows.astype(np.intp) % max(len(self), 1)
        out = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        for number, places, local in self._edges.owners(wanted):
            out[places] = self.parts[number].read_rows(local)
        return out

    def read_into(self, first: int, out: NDArray[Any]) -> int:
        """Fill `out` with neighbouring rows; return the chunks fetched. See `HDF5Matrix.read_into`."""
        if not 0 <= first <= first + len(out) <= len(self):
            raise IndexError(f"{len(out)} rows from {first} on of {self!r}")
        pieces = self._edges.pieces(first, len(out))
        return sum(self.parts[number].read_into(start, out[low:high]) for number, start, low, high in pieces)

    def close(self) -> None:
        """Let go of the files."""
        for part in self.parts:
            part.close()


def join(sources: Sequence[tuple[str, str]], start: int, end: int | None, open_matrix: Open) -> HDF5Matrix | JoinedMatrix:
    """Open rows `start` to `end` of the datasets `sources`, (path, name) each, counted over all of them.

    Raises:
        DataError: A dataset is missing, they do not fit together, or have fewer rows than `start` or `end`.
    """
    if len(sources) == 1:
        path, name = sources[0]
        return open_matrix(path, name, start, end)
    lengths = []
    for path, name in sources:
        with open_matrix(path, name, 0, None) as whole:
            lengths.append(len(whole))
    edges = [0, *itertools.accumulate(lengths)]
    stop = edges[-1] if end is None else end
    if not 0 <= start <= stop <= edges[-1]:
        names = ", ".join(f"{Path(path).name}:{name}" for path, name in sources)
        raise DataError(f"rows {start} to {stop} were asked for, and {names} have {edges[-1]} together", "look at data.split")
    parts: list[HDF5Matrix] = []
    for (path, name), first, last in zip(sources, edges, edges[1:], strict=False):
        low, high = max(start, first), min(stop, last)
        if low < high or (start == stop and not parts):
            parts.append(open_matrix(path, name, min(low, last) - first, max(high, min(low, last)) - first))
    return parts[0] if len(parts) == 1 else JoinedMatrix(parts)


def _name(matrix: HDF5Matrix) -> str:
    return f"{Path(matrix.datapath).name}:{matrix.dataset}"
