"""Datasets that the ranks of a node read together: decoded once, into memory that they share.

Each rank decodes its part of the rows into a window of shared memory (`MPI.Win.Allocate_shared`); after that every rank takes
the samples that it needs from the window. A dataset too large for the window is read from the file by each rank for itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpcutils.data.room import usable_bytes
from hpcutils.errors import DataError
from hpcutils.log import LOGGER

if TYPE_CHECKING:
    from hpcutils.data.hdf5 import HDF5Matrix

BLOCK_BYTES = 64 << 20
# The window may take this part of the memory that is free on the node when the job starts.
WINDOW_SHARE = 0.25


def free_memory_bytes() -> int:
    """Return what a window could take: memory that the ranks may use, and no more than /dev/shm has room for."""
    usable = usable_bytes()
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if usable is None else usable
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    return min(available, shm.f_bavail * shm.f_frsize) if shm is not None else available


class NodeArray:
    """Rows of an HDF5 dataset, shared by the ranks of a node.

    Args:
        matrix: The dataset; every rank of the node opens the same.
        node: mpi4py communicator of the ranks on this node, or `None` for a world of one rank.
        budget_bytes: The largest window; `None` takes a quarter of the node's free memory.

    Attributes:
        mode: `window` or `independent`: how rows are read.
    """

    def __init__(self, matrix: HDF5Matrix, node: Any = None, budget_bytes: int | None = None) -> None:
        self.matrix = matrix
        self._node = node
        self._window: Any = None
        self._rows: NDArray[Any] | None = None
        size = int(matrix.size) * matrix.dtype.itemsize
        fits = size <= (int(free_memory_bytes() * WINDOW_SHARE) if budget_bytes is None else budget_bytes)
        # Free memory changes while ranks look at it: the node's first rank decides for all.
        self.mode = "window" if (node.bcast(fits) if node is not None else fits) else "independent"
        if self.mode == "window":
            self._fill(size)

    def __len__(self) -> int:
        return len(self.matrix)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dataset, samples first."""
        return tuple(self.matrix.shape)

    def read_rows(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return the samples `rows`, in that order: `(len(rows), ...)`."""
        if self._rows is None:
            return np.asarray(self.matrix.read_rows(rows))
        return self._rows[rows]

    def close(self) -> None:
        """Let go of the window; every rank of the node must call it, since MPI frees it together."""
        self._rows = None
        if self._window is not None:
            self._window.Free()
            self._window = None
        self.matrix.close()

    def _fill(self, size: int) -> None:
        """Decode this rank's part of the rows into the window, block by block, and wait for the others."""
        self._rows = self._allocate(size)
        rank, ranks = (self._node.rank, self._node.size) if self._node is not None else (0, 1)
        unit = self._unit_rows()
        units = -(-len(self) // unit)
        start, stop = (min(units * part // ranks * unit, len(self)) for part in (rank, rank + 1))
        row_bytes = max(size // max(len(self), 1), 1)
        block = max(BLOCK_BYTES // row_bytes // unit, 1) * unit
        for first in range(start, stop, block):
            last = min(first + block, stop)
            self._rows[first:last] = self.matrix[first:last]
        if self._window is not None:
            self._window.Fence()
        LOGGER.debug("window of %d bytes filled: rows %d to %d", size, start, stop)

    def _unit_rows(self) -> int:
        """Return the rows of a chunk: parts end at chunk borders, so that no chunk is decoded by two ranks."""
        chunks = getattr(self.matrix, "chunks", None)
        return int(chunks[0]) if chunks else 1

    def _allocate(self, size: int) -> NDArray[Any]:
        if self._node is None or self._node.size == 1:
            return np.empty(self.shape, self.matrix.dtype)
        from mpi4py import MPI

        itemsize = self.matrix.dtype.itemsize
        self._window = MPI.Win.Allocate_shared(size if self._node.rank == 0 else 0, itemsize, comm=self._node)
        self._window.Fence()
        memory, _ = self._window.Shared_query(0)
        return np.ndarray(self.shape, self.matrix.dtype, buffer=memory)


def check_same_length(x: NodeArray, y: NodeArray) -> None:
    """Raise `DataError` unless there is a label for every sample."""
    if len(x) != len(y):
        raise DataError(f"x has {len(x)} samples and y has {len(y)}", "both must come from the same split of the same data")
