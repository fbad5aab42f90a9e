"""Segments in memory: read, proved, and held until everybody who needs them is done."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import NamedTuple

from hpcutils.errors import DataError, IntegrityError
from hpcutils.log import LOGGER
from hpcutils.staging.origins import FolderOrigin, Origin
from hpcutils.staging.segments import Segment

TRIES = 2


def digest_of(data: memoryview) -> str:
    """Return the digest by which segments are proved (xxh3_128)."""
    import xxhash

    return str(xxhash.xxh3_128_hexdigest(data))


class Pool:
    """Buffers of one size that go round; who asks for one waits while all are in use, which bounds the memory.

    Args:
        count: Number of buffers; each is made when it is needed first.
        size_bytes: Of each.
    """

    def __init__(self, count: int, size_bytes: int) -> None:
        self._left, self._size_bytes = count, max(size_bytes, 1)
        self._free: SimpleQueue[memoryview] = SimpleQueue()

    def take(self) -> Buffer:
        """Return a buffer that has one holder: the caller."""
        if self._left and self._free.empty():
            self._left -= 1
            return Buffer(memoryview(bytearray(self._size_bytes)), self._free)
        return Buffer(self._free.get(), self._free)


class Buffer:
    """Memory with holders: it goes back to its pool when the last one lets go."""

    def __init__(self, memory: memoryview, home: SimpleQueue[memoryview]) -> None:
        self.memory, self._home = memory, home
        self._holders, self._lock = 1, threading.Lock()

    def hold(self) -> None:
        """Count one holder more."""
        with self._lock:
            self._holders += 1

    def drop(self) -> None:
        """Count one holder less."""
        with self._lock:
            self._holders -= 1
            gone = self._holders == 0
        if gone:
            self._home.put(self.memory)


class Load(NamedTuple):
    """A segment in memory.

    Args:
        segment: Which.
        digest: What its bytes hash to: proved, where the segment says what it must be.
        buffer: Where they are.
    """

    segment: Segment
    digest: str
    buffer: Buffer

    @property
    def data(self) -> memoryview:
        """Its bytes."""
        return self.buffer.memory[: self.segment.size_bytes]


class Loader:
    """Reads segments in threads, and proves them.

    Args:
        origin: Where the dataset comes from.
        here: The dataset's files on this node, as far as they are there; `None` when none is.
        finished: Digests of segments that are there.
        node: This node's name, for messages.

    Attributes:
        origin_bytes: Bytes that were read from the origin.
        rotten: Segments of `here` that proved right once and do not any more.
    """

    def __init__(self, origin: Origin, here: Path | None, finished: dict[int, str], node: str) -> None:
        self._origin, self._finished, self._node = origin, finished, node
        self._here = None if here is None else FolderOrigin(lambda path: here / path, follow=False)
        self._threads = ThreadPoolExecutor(origin.threads, thread_name_prefix="load")
        self.origin_bytes = 0
        self.rotten: set[int] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._origin.close()

    def start(self, segment: Segment, buffer: Buffer) -> Future[Load]:
        """Begin to read; the future's error is a `DataError`, and the buffer is free again then."""
        return self._threads.submit(self._load, segment, buffer)

    def _load(self, segment: Segment, buffer: Buffer) -> Load:
        try:
            data = buffer.memory[: segment.size_bytes]
            digest = self._from_here(segment, data) or self._from_origin(segment, data)
            return Load(segment, digest, buffer)
        except BaseException:
            buffer.drop()
            raise

    def _from_here(self, segment: Segment, data: memoryview) -> str | None:
        """Read what another node lacks from this node's own disk; it must prove right once more."""
        expected = segment.digest or self._finished.get(segment.number)
        if self._here is None or segment.number not in self._finished:
            return None
        with contextlib.suppress(DataError):
            _fill(self._here, segment, data)
            if digest_of(data) == expected:
                return expected
        # It comes from the origin, and is written once more where a partial is filled.
        self.rotten.add(segment.number)
        del self._finished[segment.number]
        return None

    def _from_origin(self, segment: Segment, data: memoryview) -> str:
        for attempt in range(1, TRIES + 1):
            _fill(self._origin, segment, data)
            with self._lock:
                self.origin_bytes += segment.size_bytes
            digest = digest_of(data)
            if segment.digest in (None, digest):
                return digest
            if attempt < TRIES:
                LOGGER.warning("segment %d of %s is not what it must be; reading it again", segment.number, self._places(segment))
        raise IntegrityError(
            f"segment {segment.number} read on {self._node} from {self._places(segment)} hashes to {digest}, not {segment.digest}",
            "the source was changed or damaged since its manifest was made; nothing of it was published",
        )

    def _places(self, segment: Segment) -> str:
        first = self._origin.where(segment.pieces[0].path)
        more = len({piece.path for piece in segment.pieces}) - 1
        return f"{first} and {more} more" if more else first


def _fill(origin: Origin, segment: Segment, data: memoryview) -> None:
    for piece in segment.pieces:
        origin.read(piece, data[piece.at : piece.at + piece.size_bytes])


def prove(files: Path, segments: Iterable[Segment], finished: dict[int, str]) -> dict[int, str]:
    """Return those of `finished` whose bytes are in `files` and hash to what they must, with their digests."""
    memory = memoryview(b"")
    here, right = FolderOrigin(lambda path: files / path, follow=False), {}
    for segment in segments:
        expected = segment.digest or finished[segment.number]
        if len(memory) < segment.size_bytes:
            memory = memoryview(bytearray(segment.size_bytes))
        data = memory[: segment.size_bytes]
        try:
            _fill(here, segment, data)
        except DataError:
            here.close()
            continue
        if digest_of(data) == expected:
            right[segment.number] = expected
    here.close()
    return right
