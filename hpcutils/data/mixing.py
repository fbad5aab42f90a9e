"""A shuffled order that a file can be read in: random enough to train on, and each chunk is inflated once an epoch.

An order that takes any row after any other makes a compressed file inflate one whole chunk for every sample. Here the
chunks are put in random order, gathered in windows of some 64 MiB, and the rows of a window are shuffled among
themselves: the window's chunks stay in the cache (`hpcutils.data.chunks`) while its rows are used. A dataset that fits in
one window is shuffled as a whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcutils.data.chunks import CACHE_LEAST_BYTES

# Half of the smallest cache: while one window is used up, the next is being filled. The same on every machine: the order
# of the samples follows from it.
WINDOW_BYTES = CACHE_LEAST_BYTES // 2


class MixedOrder:
    """The order of one epoch, worked out window by window: memory grows with the number of chunks, not of rows.

    Args:
        rows: Number of rows.
        chunk_rows: Rows of a chunk.
        first_rows: Rows of the first, possibly broken chunk (where a part of a file begins inside of one); 0 for none.
        window_rows: Rows that are shuffled together; at least one chunk is.
        seed: Non-negative; the same seed and epoch give the same order.
        epoch: Non-negative.
    """

    def __init__(self, rows: int, chunk_rows: int, first_rows: int, window_rows: int, seed: int, epoch: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, epoch
        edges = np.unique(np.concatenate([[0], np.arange(first_rows, rows, chunk_rows), [rows]]))
        # (chunks,): first row and number of rows of each chunk, in the shuffled order of chunks.
        order = np.random.default_rng([seed, epoch]).permutation(len(edges) - 1)
        self._starts, self._counts = edges[:-1][order], np.diff(edges)[order]
        self._per_window = max(1, window_rows // chunk_rows)
        sums = np.concatenate([[0], np.cumsum(self._counts)])
        # (windows + 1,): place in the epoch where each window begins.
        self._edges = np.append(sums[: -1 : self._per_window], rows)
        self._last: tuple[int, NDArray[Any]] = (-1, np.empty(0, np.intp))

    def take(self, start: int, stop: int) -> NDArray[np.intp]:
        """Return the rows at places `start` to `stop` of the epoch, `(stop - start,)`."""
        first = int(np.searchsorted(self._edges, start, side="right")) - 1
        parts = []
        while start < stop:
            begin, end = int(self._edges[first]), min(int(self._edges[first + 1]), stop)
            parts.append(self._window(first)[start - begin : end - begin])
            start, first = end, first + 1
        return np.concatenate(parts) if parts else np.empty(0, np.intp)

    def _window(self, number: int) -> NDArray[Any]:
        """Return the shuffled rows of one window; the last one is kept, since batches ask for it again and again."""
        kept, rows = self._last
        if kept != number:
            chunks = slice(number * self._per_window, (number + 1) * self._per_window)
            starts, counts = self._starts[chunks], self._counts[chunks]
            # (rows,): each chunk's rows counted on from its start; before[i] rows lie before chunk i in the window.
            before = np.cumsum(counts) - counts
            rows = np.repeat(starts - before, counts) + np.arange(counts.sum(), dtype=np.intp)
            np.random.default_rng([self.seed, self.epoch, number]).shuffle(rows)
            self._last = number, rows
        return rows
