"""Datasets that fit into memory: decoded once by the ranks of a node together, and read by sample number.

Each rank decodes its part of the rows into memory that they share; after that every rank takes the samples that it needs from
there. Without that, each rank reads its samples from the file for itself.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcutils.data.segments import Matrix, count_chunks, layout_of, part_of
from hpcutils.data.shared import SharedMemory, wait_for_all
from hpcutils.log import LOGGER

BLOCK_BYTES = 64 << 20


class NodeArray:
    """Rows of an HDF5 dataset, read by their numbers.

    Args:
        matrix: The dataset; every rank of the node opens the same. It has no normalizer.
        node: mpi4py communicator of the ranks on this node, or `None` for a world of one rank.
        in_memory: Decode all of it now, into memory that the ranks share. The same on every rank.
    """

    def __init__(self, matrix: Matrix, node: Any = None, in_memory: bool = True) -> None:
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
        # No chunk is decoded by two ranks.
        layout = layout_of(matrix)
        low, high = (layout.chunks * part // ranks for part in (rank, rank + 1))
        block = max(BLOCK_BYTES // max(matrix.row_bytes * layout.chunk_rows, 1), 1)
        borders = layout.starts(np.array([*range(low, high, block), high])).tolist()
        for first, last in itertools.pairwise(borders):
            self._rows[first:last] = matrix[first:last]
        start, stop = borders[0], borders[-1]
        self.chunks_read = count_chunks(part_of(matrix.segments, start, stop))
        self._memory.sync()
        if node is not None:
            wait_for_all(node)
        self._memory.sync()
        LOGGER.debug("%d bytes in memory: rows %d to %d are from this rank", matrix.nbytes, start, stop)
