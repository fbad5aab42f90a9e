"""Rows that lie in the file as they are: in one block, or in chunks without filters. They are read past HDF5 and its lock."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from h5py._objects import phil
from numpy.typing import NDArray

from hpcutils.data.arriving import ByteSource
from hpcutils.data.keys import Rows, split_runs
from hpcutils.data.segments import Segment
from hpcutils.errors import DataError

# What a dataset without chunks is read by when rows are scattered or shuffled.
PIECE_BYTES = 1 << 20
# A gap that is cheaper to read along than to start another read: one page.
GAP_BYTES = 4096
# Up to so many chunks are looked up when a dataset without filters is opened, at about 1 us each.
MAX_PLACES = 1 << 16


class OwnDescriptor:
    """The bytes of a file that HDF5 has open, read past it.

    Args:
        file: Opened with HDF5's plain driver.

    Attributes:
        number: The descriptor.
    """

    def __init__(self, file: h5py.File) -> None:
        # A descriptor of our own: the file may be closed, and its number given to another file, while a thread reads.
        self.number = os.dup(file.id.get_vfd_handle())
        weakref.finalize(self, os.close, self.number)
        self.size_bytes = os.fstat(self.number).st_size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; see `ByteSource`.

        Raises:
            EOFError: The file was cut short.
        """
        while buffer:
            got = os.preadv(self.number, [buffer], offset)
            if got == 0:
                raise EOFError(f"the file ends at byte {offset}")
            buffer, offset = buffer[got:], offset + got


@dataclass(frozen=True)
class Blocks:
    """Where in the file rows lie as they are: `rows` of them one after the other from each of `places` (bytes) on."""

    rows: int
    places: list[int]


def stored_blocks(dataset: h5py.Dataset, plist: h5py.h5p.PropDCID) -> Blocks | None:
    """Return where the rows of an unfiltered dataset lie; `None` where only HDF5 can tell, or must make some of them up."""
    if plist.get_layout() == h5py.h5d.CONTIGUOUS and plist.get_external_count() == 0:
        place = dataset.id.get_offset()
        return None if place is None else Blocks(max(dataset.shape[0], 1), [place])
    if dataset.chunks is None or dataset.chunks[1:] != dataset.shape[1:] or dataset.file.userblock_size:
        return None
    count = -(-dataset.shape[0] // dataset.chunks[0])
    # HDF5 before 1.12.3 walks through all chunks for the address of one, and h5py has no `chunk_iter` then.
    if not 0 < count <= MAX_PLACES or not hasattr(dataset.id, "chunk_iter"):
        return None
    places = [-1] * count

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        if chunk.chunk_offset[0] < dataset.shape[0]:
            places[chunk.chunk_offset[0] // dataset.chunks[0]] = chunk.byte_offset

    with phil:
        dataset.id.chunk_iter(note)
    return None if -1 in places else Blocks(dataset.chunks[0], places)


class StoredReader:
    """Reads rows that lie in the file as they are: a dataset of one block of plain numbers, or of unfiltered chunks."""

    def __init__(self, dataset: h5py.Dataset, blocks: Blocks, source: ByteSource) -> None:
        self.shape, self.dtype = dataset.shape, dataset.dtype
        self._row_shape = self.shape[1:]
        self._row_bytes = int(np.prod(self._row_shape, dtype=np.int64)) * self.dtype.itemsize
        self.block_rows = dataset.chunks[0] if dataset.chunks else max(1, PIECE_BYTES // max(self._row_bytes, 1))
        self.segments: tuple[Segment, ...] = (Segment(self.shape[0], self.block_rows, chunked=bool(dataset.chunks)),)
        self._blocks, self._name = blocks, name_of(dataset)
        self._source = source
        self._descriptor = source.number if isinstance(source, OwnDescriptor) else None

    def read(self, rows: Rows) -> NDArray[Any]:
        """Return the rows: one read for each run of neighbours."""
        if isinstance(rows, range) and rows.step == 1 and rows:
            return self.read_range(rows.start, rows.stop)
        out = np.empty((len(rows), *self._row_shape), self.dtype)
        if out.size == 0:
            return out
        wanted = np.asarray(rows, np.intp)
        order = np.argsort(wanted, kind="stable")
        ordered = wanted[order]
        flat = out.view(np.uint8).reshape(len(wanted), self._row_bytes)  # (rows, row_bytes), the memory of `out`
        for low, high in split_runs(ordered, GAP_BYTES // self._row_bytes, self.block_rows):
            first, last = int(ordered[low]), int(ordered[high - 1])
            if high - low == 1:
                self._fill(flat[order[low]], first)
                continue
            piece = np.empty((last + 1 - first, self._row_bytes), np.uint8)
            self._fill(piece, first)
            flat[order[low:high]] = piece[ordered[low:high] - first]
        return out

    def read_range(self, first: int, stop: int) -> NDArray[Any]:
        """Return the rows from `first` up to `stop`: in one read where they lie in one block."""
        out = np.empty((stop - first, *self._row_shape), self.dtype)
        block, local = divmod(first, self._blocks.rows)
        if self._descriptor is not None and local + stop - first <= self._blocks.rows:
            place = self._blocks.places[block] + local * self._row_bytes
            if os.preadv(self._descriptor, (out,), place) == out.nbytes:  # type: ignore[arg-type]
                return out
        self._fill(out.view(np.uint8).reshape(-1), first)
        return out

    def read_into(self, first: int, out: NDArray[Any]) -> int:
        """Fill `out` from row `first` on; return the pieces of `block_rows` that this touched."""
        if out.size == 0:
            return 0
        self._fill(out.view(np.uint8).reshape(-1), first)
        pieces: int = (first + len(out) - 1) // self.block_rows - first // self.block_rows + 1
        return pieces

    def _fill(self, memory: NDArray[np.uint8], first_row: int) -> None:
        """Fill `memory`, whole rows, with the rows from `first_row` on."""
        view = memory.reshape(-1).data
        block, local = divmod(first_row, self._blocks.rows)
        while view:
            part = view[: (self._blocks.rows - local) * self._row_bytes]
            try:
                self._source.read_into(self._blocks.places[block] + local * self._row_bytes, part)
            except EOFError as exc:
                raise DataError(f"{self._name}: the file ends before row {first_row}", "it was cut short: copy it again") from exc
            except DataError as exc:
                raise type(exc)(f"{self._name}, row {first_row}: {exc.message}", exc.hint) from exc
            view, block, local = view[len(part) :], block + 1, 0


def name_of(dataset: h5py.Dataset) -> str:
    """Return what errors call the dataset. Asked while it is open: another thread may close it under a read."""
    return f"{dataset.file.filename}, dataset {dataset.name}"
