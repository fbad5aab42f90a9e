"""HDF5 chunks as bytes: undo the filters, keep a bounded number of inflated chunks, inflate several at once.

HDF5's own filter pipeline inflates one chunk at a time under one global lock, and turns the whole chunk back from its
shuffled form even when one row of it is wanted. Here the library hands over the stored bytes, and the rest is done outside
its lock: inflated by libdeflate when the package `deflate` is installed (the extra `fast`), by zlib otherwise, zstd, lz4 and blosc
by `numcodecs` (the extra `filters`, see `hpcutils.data.codecs`), and only the wanted rows are unshuffled.

Memory: one cache a process, `CACHE`, of inflated chunks for all datasets together: a thirty-second of the memory that the
process may still take, shared among the ranks of the machine, and from 128 MiB to 1 GiB. It is what makes batches smaller
than a chunk, and shuffled ones, cheap. A chunk whose rows were all wanted is not kept.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hpcutils.data.codecs import CODECS, Codec, has_numcodecs
from hpcutils.data.room import ranks_here, usable_bytes
from hpcutils.data.unshuffle import unshuffle, unshuffle_into
from hpcutils.errors import DataError

T = TypeVar("T")
U = TypeVar("U")

CACHE_LEAST_BYTES, CACHE_MOST_BYTES, CACHE_SHARE = 128 << 20, 1 << 30, 32
MAX_THREADS = 8

# Registered numbers of the filters that are undone here (H5Z_FILTER_DEFLATE, H5Z_FILTER_SHUFFLE in H5Zpublic.h).
DEFLATE, SHUFFLE = 1, 2


def _libdeflate() -> Any:
    """Return the module that inflates fastest, or `None`."""
    try:
        return importlib.import_module("deflate")
    except ImportError:
        return None


LIBDEFLATE = _libdeflate()


@dataclass(frozen=True)
class Inflated:
    """The bytes of one chunk; `shuffled` when all first bytes of the elements come first, then all second bytes, …"""

    data: bytes
    shuffled: bool


def inflate(stored: bytes, size_bytes: int) -> bytes:
    """Inflate a zlib stream that must give exactly `size_bytes`; more is never made (a small file can claim a lot).

    Raises:
        DataError: The stream is damaged, or gives another number of bytes.
    """
    if LIBDEFLATE is not None:
        with contextlib.suppress(LIBDEFLATE.DeflateError):
            data: bytes = LIBDEFLATE.zlib_decompress(stored, size_bytes)
            if len(data) == size_bytes:
                return data
        # zlib says what is wrong with it.
    return inflate_by_zlib(stored, size_bytes)


def inflate_by_zlib(stored: bytes, size_bytes: int) -> bytes:
    """Do the same as `inflate`, three times slower."""
    stream = zlib.decompressobj()
    try:
        # One byte more than expected: enough to see that there is too much, and the check sum at the end is read.
        data = stream.decompress(stored, size_bytes + 1)
    except zlib.error as exc:
        raise DataError(f"a compressed chunk of {len(stored)} bytes is damaged: {exc}") from exc
    if len(data) != size_bytes or not stream.eof:
        more = "more" if len(data) > size_bytes else f"{len(data)}{'' if stream.eof else ', then breaks off'}"
        raise DataError(f"a compressed chunk should hold {size_bytes} bytes and holds {more}")
    return data


# What undoes a compression: `call(stored, size_bytes)` returns exactly so many bytes or raises `DataError`.
INFLATE: dict[int, Codec] = {DEFLATE: inflate, **CODECS}
KNOWN_PIPELINES = {(), (SHUFFLE,), *((code,) for code in INFLATE), *((SHUFFLE, code) for code in INFLATE)}


def is_known(pipeline: tuple[int, ...]) -> bool:
    """Tell whether a chunk's filters can be undone here, with what is installed."""
    return pipeline in KNOWN_PIPELINES and (has_numcodecs() or not any(code in CODECS for code in pipeline))


def undo_filters(stored: bytes, pipeline: tuple[int, ...], mask: int, size_bytes: int) -> Inflated:
    """Undo the filters of one chunk, all but the last step of `SHUFFLE`, which `take_rows` does for the rows it takes.

    Args:
        stored: The bytes in the file.
        pipeline: One of `KNOWN_PIPELINES`.
        mask: Bit i is set when filter i was left out for this chunk (the writer found that it did not help).
        size_bytes: Size of the chunk without filters.
    """
    applied = [code for position, code in enumerate(pipeline) if not mask >> position & 1]
    codec = next((INFLATE[code] for code in applied if code in INFLATE), None)
    data = stored if codec is None else codec(stored, size_bytes)
    if len(data) != size_bytes:
        raise DataError(f"a chunk should hold {size_bytes} bytes and holds {len(data)}")
    return Inflated(data, SHUFFLE in applied)


def take_rows(chunk: Inflated, shape: tuple[int, ...], dtype: np.dtype[Any], rows: slice | NDArray[np.intp]) -> NDArray[Any]:
    """Return `rows` of a chunk of `shape`: `(len(rows), *shape[1:])`. May be a view of the chunk: copy before writing."""
    if not chunk.shuffled or dtype.itemsize == 1:
        return np.frombuffer(chunk.data, dtype).reshape(shape)[rows]
    row_items = int(np.prod(shape[1:], dtype=np.int64))
    # (itemsize, rows, row_items): plane b holds byte b of every element.
    planes = np.frombuffer(chunk.data, np.uint8).reshape(dtype.itemsize, shape[0], row_items)[:, rows]
    return unshuffle(planes.reshape(dtype.itemsize, -1)).view(dtype).reshape(-1, *shape[1:])


def copy_rows(chunk: Inflated, shape: tuple[int, ...], rows: slice, out: NDArray[Any]) -> None:
    """Copy neighbouring rows of a chunk of `shape` into `out`, `(rows, ...)`; a chunk that reaches past `out`'s axes is cut."""
    whole = out.shape[1:] == shape[1:] and out.flags.c_contiguous
    if chunk.shuffled and out.dtype.itemsize > 1 and whole:
        row_items = math.prod(shape[1:])
        planes = np.frombuffer(chunk.data, np.uint8).reshape(out.dtype.itemsize, -1)
        part = planes[:, rows.start * row_items : rows.stop * row_items]
        unshuffle_into(part, out.reshape(-1))
    else:
        out[...] = take_rows(chunk, shape, out.dtype, rows)[(slice(None), *map(slice, out.shape[1:]))]


def cache_limit(usable: int | None, ranks: int) -> int:
    """Return how many bytes of inflated chunks to keep, where `ranks` processes share `usable` bytes of memory."""
    return min(max(CACHE_LEAST_BYTES, (usable or 0) // CACHE_SHARE // ranks), CACHE_MOST_BYTES)


class ChunkCache:
    """The most recently used chunks; used by all threads of one process.

    A key is a tuple whose first element names the dataset, so that `drop` can forget all of it.

    Args:
        limit_bytes: Keep at most so many; `None` is for `cache_limit` to say when the first chunk comes.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.renew()

    def renew(self) -> None:
        """Forget everything; also what a forked child does, whose copy of the lock may be held by nobody."""
        self._lock = threading.Lock()
        self._items: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self.used_bytes = 0

    def get(self, key: tuple[Any, ...]) -> Any | None:
        """Return what `put` stored, or `None`."""
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: tuple[Any, ...], value: Any, size_bytes: int) -> None:
        """Keep `value`; the least recently used make room. What is larger than the whole cache is not kept."""
        with self._lock:
            if self.limit_bytes is None:
                self.limit_bytes = cache_limit(usable_bytes(), ranks_here())
            if size_bytes > self.limit_bytes or key in self._items:
                return
            self._items[key] = value, size_bytes
            self.used_bytes += size_bytes
            while self.used_bytes > self.limit_bytes:
                self.used_bytes -= self._items.popitem(last=False)[1][1]

    def drop(self, dataset: Any) -> None:
        """Forget the chunks of one dataset."""
        with self._lock:
            for key in [key for key in self._items if key[0] == dataset]:
                self.used_bytes -= self._items.pop(key)[1]


class Workers:
    """Threads that inflate chunks: as many as this process may use cores, made at first use, anew in a forked child."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Forget the threads: a forked child has none of its parent's."""
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def map(self, call: Callable[[T], U], items: list[T]) -> Iterable[U]:
        """Return `call(item)` for each item, in order; at once in this thread when there is only one or only one core."""
        count = min(len(os.sched_getaffinity(0)), MAX_THREADS)
        if len(items) < 2 or count < 2:
            return map(call, items)
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(count, "hpcutils-inflate")
        try:
            return self._pool.map(call, items)
        except RuntimeError:  # the interpreter is ending and takes no new work, while a thread of the user still reads
            return map(call, items)


CACHE = ChunkCache()
WORKERS = Workers()
os.register_at_fork(after_in_child=CACHE.renew)
os.register_at_fork(after_in_child=WORKERS.renew)
