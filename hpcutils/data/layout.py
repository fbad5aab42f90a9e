"""How samples lie in the chunks of their files: what the order of an epoch is made from. Arithmetic only, no I/O."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hpcutils.data.scramble import Ints
from hpcutils.errors import DataError


@dataclass(frozen=True)
class Layout:
    """How samples lie in chunks.

    Args:
        samples: Number of samples, at least 1.
        chunk_rows: Samples of a chunk.
        first_rows: Samples of the first chunk where a part of a file begins inside of one; 0 when it is whole.
        row_bytes: Size of a sample, inflated.
        breaks: For each file after the first, or each other place where chunks begin anew: the sample there, ascending, and the
            samples of the first chunk from there on, 0 when it is whole.
    """

    samples: int
    chunk_rows: int = 1
    first_rows: int = 0
    row_bytes: int = 1
    breaks: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise DataError("there are no samples", "look at the file's datasets, and at data.split")

    @cached_property
    def chunks(self) -> int:
        """Number of chunks, broken ones included."""
        return self._numbers[-1]

    def start(self, chunk: int) -> int:
        """Return the first sample of a chunk."""
        part = bisect_right(self._numbers, chunk) - 1
        within = chunk - self._numbers[part]
        return self._edges[part] + (self._firsts[part] + (within - 1) * self.chunk_rows if within else 0)

    def starts(self, chunks: Ints) -> Ints:
        """Return the first sample of each chunk; `chunks` itself may be asked for, and gives the number of samples."""
        numbers, edges, firsts = (np.array(part, np.int64) for part in (self._numbers, self._edges, [*self._firsts, 0]))
        part = np.searchsorted(numbers, chunks, side="right") - 1
        within = chunks - numbers[part]
        return np.asarray(edges[part] + np.where(within > 0, firsts[part] + (within - 1) * self.chunk_rows, 0))

    def sizes(self, chunks: Ints) -> Ints:
        """Return the number of samples of each chunk."""
        return np.asarray(self.starts(chunks + 1) - self.starts(chunks))

    @cached_property
    def broken(self) -> dict[int, int]:
        """Return {chunk: samples that it lacks} for the first and last chunk of each file, where they are not whole."""
        numbers = np.array(self._numbers, np.int64)
        ends = np.unique(np.concatenate([numbers[:-1], numbers[1:] - 1]))
        lacks = self.chunk_rows - self.sizes(ends)
        return {int(chunk): int(lack) for chunk, lack in zip(ends, lacks, strict=True) if lack}

    @cached_property
    def _edges(self) -> list[int]:
        """First sample of each file, and the number of samples."""
        return [0, *(sample for sample, _ in self.breaks), self.samples]

    @cached_property
    def _firsts(self) -> list[int]:
        """Samples of the first chunk of each file."""
        given = [self.first_rows, *(rows for _, rows in self.breaks)]
        sizes = zip(self._edges, self._edges[1:], strict=False)
        return [min(rows or self.chunk_rows, stop - start) for rows, (start, stop) in zip(given, sizes, strict=True)]

    @cached_property
    def _numbers(self) -> list[int]:
        """Number of the first chunk of each file, and of all chunks."""
        numbers = [0]
        for first, start, stop in zip(self._firsts, self._edges, self._edges[1:], strict=False):
            numbers.append(numbers[-1] + 1 - (first - (stop - start)) // self.chunk_rows)
        return numbers
