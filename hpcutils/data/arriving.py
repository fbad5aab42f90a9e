"""HDF5 files that are not on this node's disk yet: their bytes come from something that knows where each of them is now.

`hpcutils.staging` is such a source. This room must not know it: what it needs of one is here.
"""

from __future__ import annotations

import io
import itertools
import os
from typing import Any, Protocol

import h5py
import numpy as np
from h5py._objects import phil

# No file system has this number: tells the identity of such a file from those of files that `stat` knows.
NO_DEVICE = -1
_numbers = itertools.count()


class ByteSource(Protocol):
    """A file that can be read at any place, by any thread.

    Attributes:
        size_bytes: Its length.
    """

    size_bytes: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; all of them lie in the file.

        Raises:
            DataError: They cannot be had.
        """


class SourceFile(io.RawIOBase):
    """A `ByteSource` as the file object that `h5py.File` takes. Used under h5py's lock, which guards the position.

    h5py fills its buffer by one `readinto` and does not look at the count: all of it must come.

    Args:
        source: The bytes.
        name: How messages call the file.
    """

    def __init__(self, source: ByteSource, name: str) -> None:
        super().__init__()
        self.source, self._name, self._position = source, name, 0

    def __repr__(self) -> str:
        # What h5py takes for the file's name.
        return self._name

    def readable(self) -> bool:
        """Return `True`."""
        return True

    def seekable(self) -> bool:
        """Return `True`."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, and return it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.source.size_bytes}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the file goes; what lies past its end is 0, as HDF5's own drivers have it."""
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(0, self.source.size_bytes - self._position))
        self.source.read_into(self._position, view[:count])
        view[count:] = bytes(len(view) - count)
        self._position += count
        return count


def source_identity(source: ByteSource) -> tuple[int, int, int, int, int]:
    """Return a new identity for a file that has none on a disk: the same shape as `h5file.Identity`."""
    return NO_DEVICE, next(_numbers), source.size_bytes, 0, 0


class ChunkPlaces:
    """Where the chunks of a dataset lie in the file: with that their bytes are read past h5py's lock, by several threads at once.

    HDF5 finds one chunk's place by a walk over all: here they are listed once, 20 bytes a chunk.

    Args:
        dataset: Chunked, of a file without a user block.
        source: The file's bytes.
    """

    def __init__(self, dataset: h5py.Dataset, source: ByteSource) -> None:
        self._source, self._chunks = source, dataset.chunks
        grid = tuple(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
        # Bytes 0: never written.
        self._offset, self._size = np.zeros(grid, np.int64), np.zeros(grid, np.int64)
        self._mask = np.zeros(grid, np.uint32)
        with phil:
            dataset.id.chunk_iter(self._note)

    def _note(self, info: Any) -> None:
        index = self._index(info.chunk_offset)
        self._offset[index], self._size[index], self._mask[index] = info.byte_offset, info.size, info.filter_mask

    def _index(self, start: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(first // length for first, length in zip(start, self._chunks, strict=True))

    def read(self, start: tuple[int, ...]) -> tuple[int, bytes] | None:
        """Return the filter mask and the stored bytes of the chunk that begins at `start`; `None` where there is none."""
        index = self._index(start)
        size = int(self._size[index])
        if not size:
            return None
        stored = bytearray(size)
        self._source.read_into(int(self._offset[index]), memoryview(stored))
        return int(self._mask[index]), bytes(stored)


def places_of(file: h5py.File, dataset: h5py.Dataset, source: ByteSource | None) -> ChunkPlaces | None:
    """Return where the chunks lie, where that can be known; else h5py reads them from its file object, one at a time.

    HDF5 before 1.12.3 cannot list them in one go, and before 1.14.2 counts from behind a user block.
    """
    if source is None or file.userblock_size or not hasattr(dataset.id, "chunk_iter"):
        return None
    return ChunkPlaces(dataset, source)
