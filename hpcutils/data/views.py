"""Virtual datasets that are whole rows of other datasets, one run after the other: read from those, each by its own reader.

HDF5 decodes a source's chunk again for every read that touches it, and does not say where the chunks lie. Where a virtual dataset
is runs of rows along the first axis, without gaps, the runs are read as what they are. Anything else (other axes, every second row,
gaps, other types, series of files) is left to HDF5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpcutils.data.keys import Rows
from hpcutils.data.readers import Reader
from hpcutils.data.segments import Edges, part_of

# A dataset of more runs costs more to plan than its chunks to decode.
MAX_RUNS = 1024


@dataclass(frozen=True)
class RowRun:
    """Neighbouring rows of a source that are neighbouring rows of a virtual dataset.

    Args:
        file: As the virtual dataset names it; `.` is its own.
        dataset: Name of the source.
        first: First row of the source.
        rows: How many.
        all: Whether they are all rows that the source has when it is opened.
    """

    file: str
    dataset: str
    first: int
    rows: int
    all: bool = False


def row_runs(dataset: h5py.Dataset) -> list[RowRun] | None:
    """Return the runs of rows that a virtual dataset is, in its order; `None` where it is anything else."""
    plist = dataset.id.get_create_plist()
    if plist.get_virtual_count() > 16 * MAX_RUNS:
        return None
    found = []
    for i in range(plist.get_virtual_count()):
        run = RowRun(plist.get_virtual_filename(i), plist.get_virtual_dsetname(i), 0, 0)
        source = plist.get_virtual_srcspace(i)
        here = _whole_rows(plist.get_virtual_vspace(i), dataset.shape[1:])
        # "All" of a source has no bounds before that is opened.
        everything = source.get_select_type() == h5py.h5s.SEL_ALL
        there = range(len(here or ())) if everything else _whole_rows(source, dataset.shape[1:])
        if here is None or there is None or len(here) != len(there) or "%" in run.file + run.dataset:
            return None
        found.append((here.start, replace(run, first=there.start, rows=len(there), all=everything)))
    runs: list[RowRun] = []
    end = 0
    for start, run in sorted(found, key=lambda item: item[0]):
        if start != end:
            return None  # a gap, whose rows are fill values, or an overlap
        end += run.rows
        before = runs[-1] if runs else None
        if before is not None and not run.all and run == replace(before, first=before.first + before.rows, rows=run.rows):
            runs[-1] = replace(before, rows=before.rows + run.rows)
        else:
            runs.append(run)
    return runs if end == dataset.shape[0] and 0 < len(runs) <= MAX_RUNS else None


def _whole_rows(space: Any, row_shape: tuple[int, ...]) -> range | None:
    """Return the rows that a selection is, if it is neighbouring rows as wholes."""
    kind = space.get_select_type()
    if kind == h5py.h5s.SEL_ALL:
        return range(space.shape[0]) if space.shape[1:] == row_shape else None
    if kind != h5py.h5s.SEL_HYPERSLABS or space.shape[1:] != row_shape:
        return None
    try:
        first, last = space.get_select_bounds()
    except (ValueError, RuntimeError):  # a selection without end
        return None
    sizes = [high - low + 1 for low, high in zip(first, last, strict=True)]
    whole = tuple(sizes[1:]) == row_shape and space.get_select_npoints() == int(np.prod(sizes, dtype=object))
    return range(int(first[0]), int(last[0]) + 1) if whole else None


class ViewReader:
    """Reads a virtual dataset from its sources.

    Args:
        runs: From `row_runs`.
        readers: Of each run's source.
        shape: Of the virtual dataset.
    """

    def __init__(self, runs: Sequence[RowRun], readers: Sequence[Reader], shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = shape, readers[0].dtype
        self.block_rows = max(reader.block_rows for reader in readers)
        self._firsts, self._readers = [run.first for run in runs], list(readers)
        parts = (part_of(r.segments, run.first, run.first + run.rows) for run, r in zip(runs, readers, strict=True))
        self.segments = tuple(segment for part in parts for segment in part)
        self._edges = Edges([run.rows for run in runs])

    def read(self, rows: Rows) -> NDArray[Any]:
        """Return the rows, each source's at once."""
        if isinstance(rows, range) and rows.step == 1:
            return self.read_range(rows.start, rows.start + len(rows))
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for number, places, local in self._edges.owners(np.asarray(rows, np.intp)):
            out[places] = self._readers[number].read(local + self._firsts[number])
        return out

    def read_range(self, first: int, stop: int) -> NDArray[Any]:
        """Return the rows from `first` up to `stop`."""
        out = np.empty((stop - first, *self.shape[1:]), self.dtype)
        for number, start, low, high in self._edges.pieces(first, stop - first):
            there = self._firsts[number] + start
            out[low:high] = self._readers[number].read_range(there, there + high - low)
        return out

    def read_into(self, first: int, out: NDArray[Any]) -> int:
        """Fill `out` from row `first` on; return the chunks fetched."""
        pieces = self._edges.pieces(first, len(out))
        return sum(self._readers[n].read_into(self._firsts[n] + start, out[low:high]) for n, start, low, high in pieces)
