"""The order of an epoch: chunks, shards, windows, and one global sequence of samples. Arithmetic only, no I/O.

    chunks    permuted as a whole, then dealt in turn into shards: place p of the permutation goes to shard p mod S
    shards    S of them, whatever the world: see `shard_count`. Each is cut into windows of neighbouring chunks
    windows   their samples are permuted among themselves
    sequence  all shards merged: sample i of shard s, of n samples, has the time (i + (2s + 1) / 2S) / n; earlier times come first

All of it follows from (seed, epoch, layout), and no step needs what came before: any position is reachable directly. While shards
are equally long, the sequence takes one sample of each in turn. A node that owns the shards s = r (mod nodes) so has its share of
any run of positions, to within a few samples (`node_rows` is the bound).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpcutils.data.layout import Layout as Layout
from hpcutils.data.scramble import Ints, key_of, permute, table, tables

# What the windows that are in use at one time hold, all shards together. A part of the order: the same on every machine.
POOL_BYTES = 256 << 20
# Divides by 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48 and 96 nodes; a dataset of fewer chunks takes the next that it can fill.
SHARD_COUNTS = (96, 48, 24, 12, 6, 4, 3, 2, 1)
# Where samples are not shuffled there is one shard, and this many windows share the pool.
SEQUENTIAL_WINDOWS = 8
# Words that tell the uses of a key apart.
CHUNKS, SAMPLES = 1, 2
# Windows that are this large all together have their permutations in tables; 8 MB each.
GENERATION_ROWS = 1 << 19
# The chunks of an epoch are permuted in a table of 8 MB at the most: 48 GB of data in chunks of 48 KiB.
CHUNK_TABLE_SIZE = 1 << 20


def shard_count(layout: Layout) -> int:
    """Return the number of canonical shards: as many as there are chunks for, and as the pool has room for one chunk of each."""
    room = POOL_BYTES // max(layout.chunk_rows * layout.row_bytes, 1)
    return next(count for count in SHARD_COUNTS if count <= max(min(layout.chunks, room), 1))


@dataclass(frozen=True, eq=False)
class Window:
    """Neighbouring chunks of one shard, whose samples are permuted among themselves.

    Args:
        shard: Which shard.
        number: Which of its windows.
        first: Samples of the shard before the window.
        chunks: `(chunks,)` numbers of the file's chunks.
        starts: `(chunks,)` first sample of each.
        offsets: `(chunks + 1,)` samples of the window before each chunk; the last one is the number of samples.
    """

    shard: int
    number: int
    first: int
    chunks: Ints
    starts: Ints
    offsets: Ints

    @property
    def rows(self) -> int:
        """Number of samples."""
        return int(self.offsets[-1])

    def numbers(self) -> Ints:
        """Return the numbers of its samples, chunk by chunk."""
        return np.asarray(np.repeat(self.starts - self.offsets[:-1], np.diff(self.offsets)) + np.arange(self.rows))


@dataclass(frozen=True, eq=False)
class _Generation:
    """The windows of the same number of some shards: `(shards, most rows)` places in their order, and sample numbers."""

    places: Ints
    rows: Ints


@dataclass(frozen=True, eq=False)
class Run:
    """A run of positions of the global sequence.

    Args:
        rows: `(n,)` sample numbers; -1 where a sample was not asked for.
        shards: `(n,)` the shard of each.
        windows: `(n,)` the number of its window among its shard's.
        places: `(n,)` its place in the window, in the order of the window's chunks.
    """

    rows: Ints
    shards: Ints
    windows: Ints
    places: Ints


class EpochOrder:
    """The order of one epoch.

    Args:
        layout: How the samples lie in chunks.
        seed: 0 to 2^64 - 1.
        epoch: Counted from 0.
        shuffle: `False` leaves the samples in the file's order, in one shard.
    """

    def __init__(self, layout: Layout, seed: int, epoch: int, shuffle: bool = True) -> None:
        self.layout, self.shuffle = layout, shuffle
        self.shards = shard_count(layout) if shuffle else 1
        self.window_chunks = window_chunks(layout, self.shards)
        self._key = key_of(seed, epoch)
        small = layout.chunks <= CHUNK_TABLE_SIZE
        self._chunk_table = table(layout.chunks, key_of(self._key, CHUNKS)) if small and shuffle else None
        shards = np.arange(self.shards)
        self.shard_chunks: Ints = (layout.chunks - shards + self.shards - 1) // self.shards
        # Per shard, (number in the shard, samples lacking) of its broken chunks, in that order.
        self._broken = self._find_broken()
        lacks = np.array([sum(lack for _, lack in broken) for broken in self._broken], np.int64)
        self.sizes: Ints = self.shard_chunks * layout.chunk_rows - lacks
        self._phases = (2 * shards + 1) / (2 * self.shards)
        # Elements that rounding may put on the wrong side of a time, and then some: see `counts_before`.
        self._doubtful = 2 * self.shards * int(self.sizes.max()) // layout.samples + 3
        rows = self.window_chunks * layout.chunk_rows
        self._has_tables = self.shards * rows <= GENERATION_ROWS
        self._generations: dict[tuple[int, int, int], _Generation] = {}

    def times(self, shards: Ints, indices: Ints) -> NDArray[np.float64]:
        """Return the time of sample `indices` of `shards`, in (0, 1). Correctly rounded divisions: alike on all machines."""
        return np.asarray((indices + self._phases[shards]) / self.sizes[shards])

    def counts_before(self, position: int) -> Ints:
        """Return how many samples of each shard lie before a position of the global sequence, `(shards,)`."""
        if position >= self.layout.samples:
            return self.sizes
        # Near position / N of each shard's samples lie before it. The exact border is found among the few around that.
        near = np.floor(self.sizes * (position / self.layout.samples) - self._phases).astype(np.int64)
        low = np.clip(near - self._doubtful, 0, self.sizes)
        high = np.clip(near + self._doubtful, 0, self.sizes)
        shards, indices = spread(low, high)
        earliest = np.argsort(self.times(shards, indices), kind="stable")[: position - int(low.sum())]
        return low + np.bincount(shards[earliest], minlength=self.shards)

    def run(self, start: int, stop: int, first_shard: int = 0, stride: int = 1) -> Run:
        """Return positions `start` to `stop`; rows of other shards than `first_shard`, `first_shard + stride`, … are left out."""
        low, high = self.counts_before(start), self.counts_before(stop)
        shards, indices = spread(low, high)
        edges = np.concatenate([[0], np.cumsum(high - low)])
        # (3, n): sample number, window, place in it; shard by shard.
        found = np.full((3, len(shards)), -1, np.int64)
        for number, shard in enumerate(range(first_shard, self.shards, stride)):
            self._fill(found[:, edges[shard] : edges[shard + 1]], shard, int(low[shard]), (number, first_shard, stride))
        # Stable: samples of the same time come in the order of their shards.
        merged = np.argsort(self.times(shards, indices), kind="stable")
        rows, windows, places = found[:, merged]
        return Run(rows, shards[merged], windows, places)

    def _fill(self, found: Ints, shard: int, first: int, which: tuple[int, int, int]) -> None:
        """Fill `(3, n)` with the samples of `shard` from its sample `first` on."""
        done = 0
        while done < found.shape[1]:
            number = self._window_at(shard, first + done)
            start, rows = self.span(shard, number)
            begin = first + done - start
            count = min(rows - begin, found.shape[1] - done)
            part = found[:, done : done + count]
            part[0], part[2] = self._placed(shard, number, begin, count, which)
            part[1] = number
            done += count

    def _placed(self, shard: int, number: int, begin: int, count: int, which: tuple[int, int, int]) -> tuple[Ints, Ints]:
        """Return sample numbers and places of samples `begin` to `begin + count` of a window."""
        if self.shuffle and self._has_tables:
            row, first_shard, stride = which
            known = self._generation(number, first_shard, stride)
            return known.rows[row, begin : begin + count], known.places[row, begin : begin + count]
        window, places = self.window(shard, number), np.arange(begin, begin + count, dtype=np.int64)
        if self.shuffle:
            places = permute(places, window.rows, self._window_key(shard, number))
        chunk = np.searchsorted(window.offsets, places, side="right") - 1
        return window.starts[chunk] + places - window.offsets[chunk], places

    def _generation(self, number: int, first_shard: int, stride: int) -> _Generation:
        """Return windows `number` of shards `first_shard`, `first_shard + stride`, …; three generations are kept."""
        key = (number, first_shard, stride)
        known = self._generations.get(key)
        if known is None:
            if len(self._generations) > 2:
                self._generations.pop(next(iter(self._generations)))
            known = self._generations[key] = self._new_generation(number, range(first_shard, self.shards, stride))
        return known

    def _new_generation(self, number: int, shards: range) -> _Generation:
        # All windows at once: numpy's cost a call would be that of 50 samples for each of them.
        keys = np.array([self._window_key(shard, number) for shard in shards], np.uint64)
        windows = [self.window(shard, number) if number < self.window_count(shard) else None for shard in shards]
        most = max(window.rows for window in windows if window is not None)
        plain = np.zeros((len(shards), most), np.int64)
        sizes = np.zeros(len(shards), np.int64)
        for row, window in enumerate(windows):
            if window is not None:
                sizes[row] = window.rows
                plain[row, : window.rows] = window.numbers()
        # (shards, most): places beyond a window's end are sorted behind all others.
        places = tables(keys, sizes, most)
        return _Generation(places, np.take_along_axis(plain, places, axis=1))

    def _window_key(self, shard: int, number: int) -> int:
        return key_of(self._key, SAMPLES, shard, number)

    def window_count(self, shard: int) -> int:
        """Return the number of windows of a shard: chunks are spread over them evenly."""
        return -(-int(self.shard_chunks[shard]) // self.window_chunks)

    def span(self, shard: int, number: int) -> tuple[int, int]:
        """Return the first sample of a window among its shard's, and how many it has."""
        first, stop = (self._rows_before(shard, chunk) for chunk in self._window_chunks(shard, number))
        return first, stop - first

    def window(self, shard: int, number: int) -> Window:
        """Return window `number` of `shard`."""
        low, high = self._window_chunks(shard, number)
        names = self._chunk_names(np.arange(low, high, dtype=np.int64) * self.shards + shard)
        layout = self.layout
        starts, offsets = [], [0]
        for name in names.tolist():
            # In Python's own numbers: most windows have few chunks.
            starts.append(layout.start(name))
            offsets.append(offsets[-1] + layout.chunk_rows - layout.broken.get(name, 0))
        return Window(shard, number, self._rows_before(shard, low), names, np.array(starts), np.array(offsets))

    def _window_chunks(self, shard: int, number: int) -> tuple[int, int]:
        chunks, count = int(self.shard_chunks[shard]), self.window_count(shard)
        return -(-number * chunks // count), -(-(number + 1) * chunks // count)

    def _window_at(self, shard: int, index: int) -> int:
        """Return the window that sample `index` of a shard lies in."""
        rows, virtual = self.layout.chunk_rows, index
        for chunk, lack in self._broken[shard]:
            # As if broken chunks were whole: what they lack follows their last sample.
            virtual += lack * (virtual >= (chunk + 1) * rows - lack)
        return virtual // rows * self.window_count(shard) // int(self.shard_chunks[shard])

    def _rows_before(self, shard: int, chunk: int) -> int:
        lacks = sum(lack for number, lack in self._broken[shard] if number < chunk)
        return chunk * self.layout.chunk_rows - lacks

    def _chunk_names(self, places: Ints) -> Ints:
        """Return the file's chunks at places of the permutation of all chunks."""
        if not self.shuffle:
            return places
        if self._chunk_table is not None:
            return self._chunk_table[places]
        return permute(places, self.layout.chunks, key_of(self._key, CHUNKS))

    def _find_broken(self) -> list[list[tuple[int, int]]]:
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.shards)]
        lacks = self.layout.broken
        chunks = np.array(list(lacks), np.int64)
        for place, lack in zip(self._places_of(chunks).tolist(), lacks.values(), strict=True):
            found[place % self.shards].append((place // self.shards, lack))
        return [sorted(chunks) for chunks in found]

    def _places_of(self, chunks: Ints) -> Ints:
        """Return the places of the file's chunks in the permutation of all chunks; the inverse of `_chunk_names`."""
        if not self.shuffle:
            return chunks
        if self._chunk_table is not None:
            places = np.flatnonzero(np.isin(self._chunk_table, chunks))
            return np.asarray(places[np.argsort(self._chunk_table[places])[np.argsort(np.argsort(chunks))]])
        return permute(chunks, self.layout.chunks, key_of(self._key, CHUNKS), inverse=True)


def window_chunks(layout: Layout, shards: int) -> int:
    """Return the most chunks of a window."""
    windows = max(shards, SEQUENTIAL_WINDOWS)
    return max(1, POOL_BYTES // windows // max(layout.chunk_rows * layout.row_bytes, 1))


def spread(low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """Return shards and indices of all elements from `low[s]` to `high[s]` of each shard s, shard by shard."""
    sizes = high - low
    shards = np.repeat(np.arange(len(sizes)), sizes)
    firsts = np.cumsum(sizes) - sizes
    return shards, np.arange(len(shards)) + np.repeat(low - firsts, sizes)


def node_rows(layout: Layout, batch_size: int, nodes: int) -> int:
    """Return the most samples that any global batch of any epoch has of the shards of one node.

    `nodes` divides the number of shards. Shards with as many chunks each form a class: up to two classes, and each broken chunk
    makes a class of its own. A class' samples come in turns, so a node's part of any run of them differs from its due by what
    `_turn_width` says; between classes the due itself wavers. docs/decisions/0007 has the steps.
    """
    shards = shard_count(layout)
    longer, broken = layout.chunks % shards, len(layout.broken)
    if longer == 0 and not broken:
        return -(-batch_size // nodes)
    classes = [part for part in (range(longer), range(longer, shards)) if len(part)]
    largest, smallest = _shares(layout, shards, nodes)
    apart = broken * max(largest, 1 - smallest)
    # A broken chunk's shard strays by itself, and its absence widens the turns of the others by up to 1.
    width, widest = broken + apart, 0.0
    for part in classes:
        counts = np.bincount(np.asarray(part) % nodes, minlength=nodes)
        spare = min(1.0, 1 - (len(part) - broken - 1) / shards)
        uneven = 1 + int(counts.max() - counts.min()) + len(part) * sum(layout.broken.values()) / layout.samples
        width += uneven * spare + _turn_width(part, nodes)
        widest = max(widest, spare)
    width += apart * widest
    return min(batch_size, math.floor(largest * batch_size + width))


def _shares(layout: Layout, shards: int, nodes: int) -> tuple[float, float]:
    """Return bounds of the share that one node has of all samples: the largest, and the smallest."""
    each, longer = divmod(layout.chunks, shards)
    most, fewest = (each * (shards // nodes) + part for part in (-(-longer // nodes), longer // nodes))
    lacking = sum(layout.broken.values())
    rows = layout.chunk_rows / layout.samples
    return min(1.0, most * rows), max(0.0, fewest * rows - lacking / layout.samples)


def _turn_width(part: range, nodes: int) -> float:
    """Return how widely the count of one node's members, among the first x of a class, strays from its share of x."""
    owners = np.asarray(part) % nodes
    widest = 0.0
    for node in range(nodes):
        counts = np.concatenate([[0], np.cumsum(owners == node)])
        strays = counts - counts[-1] / len(part) * np.arange(len(part) + 1)
        widest = max(widest, float(strays.max() - strays.min()))
    return widest
