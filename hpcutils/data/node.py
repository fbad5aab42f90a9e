"""Datasets that fit into memory: decoded once by the ranks of a node together, and read by sample number.

Each rank decodes its part of the rows into memory that they share; after that every rank takes the samples that it needs from
there. Without that, each rank reads its samples from the file for itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpcutils.data.shared import SharedMemory, wait_for_all
from hpcutils.log import LOGGER

if TYPE_CHECKING:
    from hpcutils.data.hdf5 import HDF5Matrix

BLOCK_BYTES = 64 << 20


class NodeArray:
    """Rows of an HDF5 dataset, read by their numbers.

    Args:
        matrix: The dataset; every rank of the node opens the same. It has no normalizer.
        node: mpi4py communicator of the ranks on this node, or `None` for a world of one rank.
        in_memory: Decode all of it now, into memory that the ranks share. The same on every rank.
    """

    def __init__(self, matrix: HDF5Matrix, node: Any = None, in_memory: bool = True) -> None:
        self.matrix = matrix
        self._memory: SharedMemory | None = None
        self._rows: NDArray[Any] | None = None
        self.chunks_read = 0
        if in_memory:
            self._fill(node)

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
        """Let go of the memory; every rank of the node must call it, since MPI frees it together."""
        self._rows = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        self.matrix.close()

    def _fill(self, node: Any) -> None:
        """Decode this rank's part of the rows, block by block, and wait for the others."""
        matrix = self.matrix
        rank, ranks = (node.rank, node.size) if node is not None else (0, 1)
        self._memory = SharedMemory(matrix.nbytes + 64, node)
        self._rows = self._memory.array(self.shape, matrix.dtype)
        start, stop = (_chunk_border(matrix, len(self) * part // ranks) for part in (rank, rank + 1))
        block = max(BLOCK_BYTES // max(matrix.row_bytes, 1) // matrix.chunk_rows, 1) * matrix.chunk_rows
        for first in range(start, stop, block):
            self._rows[first : min(first + block, stop)] = matrix[first : min(first + block, stop)]
        self.chunks_read = -(-(stop - start) // matrix.chunk_rows) * matrix.chunk_pieces
        self._memory.sync()
        if node is not None:
            wait_for_all(node)
        self._memory.sync()
        LOGGER.debug("%d bytes in memory: rows %d to %d are from this rank", matrix.nbytes, start, stop)


def _chunk_border(matrix: HDF5Matrix, row: int) -> int:
    """Return the next row that begins a chunk of the file, so that no chunk is decoded by two ranks."""
    border = -(-(row + matrix.start) // matrix.chunk_rows) * matrix.chunk_rows - matrix.start
    return min(max(border, 0) if row else 0, len(matrix))
