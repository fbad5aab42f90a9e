"""Segments on their way to a node's disk: written by threads, noted when they are there, hashed behind them where need be."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from hpcutils.errors import DataError
from hpcutils.staging.load import Load
from hpcutils.staging.segments import Piece
from hpcutils.staging.store import FILES, SEGMENTS

THREADS = 2
# Written pages are sent on their way at once: what is left for the flush at the end is little.
WRITE_BACK_BYTES = 8 << 20
HASH_BLOCK_BYTES = 1 << 20


class Landing:
    """A partial that is being filled.

    Args:
        partial: Its folder, with a sidecar that has been begun.
        follower: What hashes behind the writing, or `None`.

    Attributes:
        error: The first thing that went wrong, or `None`. After it segments are taken and thrown away: other nodes
            still want what this one hands on.
    """

    def __init__(self, partial: Path, follower: Follower | None = None) -> None:
        self._files, self._follower = partial / FILES, follower
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="land")
        self._pending: list[Future[None]] = []
        self._last = threading.local()
        self._lock = threading.Lock()
        self._open: set[int] = set()
        self.error: DataError | None = None
        self.landed_bytes = 0
        # Not buffered: what a full disk refused would be tried again when the file is closed.
        self._sidecar = os.open(partial / SEGMENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._open.add(self._sidecar)

    def __enter__(self) -> Landing:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._threads.shutdown()
        while self._open:
            with contextlib.suppress(OSError):
                os.close(self._open.pop())

    def land(self, load: Load) -> None:
        """Write a segment that was proved; returns at once."""
        load.buffer.hold()
        self._pending = [future for future in self._pending if not future.done() or future.exception() is not None]
        self._pending.append(self._threads.submit(self._write, load))

    def wait(self) -> None:
        """Wait until everything is written, and close what is open: some disks refuse only then. Nothing lands after it.

        Raises:
            DataError: Something could not be written.
        """
        for future in self._pending:
            future.result()
        try:
            while self.error is None and self._open:
                os.close(self._open.pop())
        except OSError as exc:
            self.error = self._refused("the last segments", exc)
        if self.error is not None:
            raise self.error

    def _write(self, load: Load) -> None:
        try:
            if self.error is None:
                for piece in load.segment.pieces:
                    self._put(piece, load.data[piece.at : piece.at + piece.size_bytes])
                self._note(load)
        except BaseException as exc:  # noqa: BLE001 - in a thread: a write that is lost in silence would be published
            self.error = self._refused(f"segment {load.segment.number}", exc)
        finally:
            load.buffer.drop()

    def _refused(self, what: str, exc: BaseException) -> DataError:
        return DataError(
            f"cannot write {what} to {self._files.parent}: {_said(exc)}",
            "check the space and the rights there, or set HPCUTILS_NODE_CACHE to another local disk",
        )

    def _note(self, load: Load) -> None:
        with self._lock:
            self.landed_bytes += load.segment.size_bytes
            line = f"{load.segment.number} {load.digest}\n".encode()
            if os.write(self._sidecar, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._follower is not None:
            self._follower.arrived(load.segment.number)

    def _put(self, piece: Piece, data: memoryview) -> None:
        if piece.size_bytes == piece.file_bytes:
            descriptor = _create(f"{self._files}/{piece.path}", os.O_TRUNC)
            try:
                _write_all(descriptor, data, 0)
            finally:
                os.close(descriptor)
            return
        _write_all(self._part_of(piece), data, piece.offset)

    def _part_of(self, piece: Piece) -> int:
        """Return the descriptor of a file of several segments: each thread keeps the last one."""
        path, descriptor = getattr(self._last, "file", (None, -1))
        if path != piece.path:
            if path is not None:
                self._open.discard(descriptor)
                os.close(descriptor)
                self._last.file = (None, -1)
            descriptor = _create(f"{self._files}/{piece.path}", 0)
            self._open.add(descriptor)
            self._last.file = (piece.path, descriptor)
            os.ftruncate(descriptor, piece.file_bytes)
        return int(descriptor)


def _said(exc: BaseException) -> str:
    return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__


def _create(path: str, flags: int) -> int:
    flags |= os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        step = data[done : done + WRITE_BACK_BYTES]
        count = os.pwrite(descriptor, step, offset + done)
        if count >= WRITE_BACK_BYTES:
            with contextlib.suppress(OSError):
                os.posix_fadvise(descriptor, offset + done, count, os.POSIX_FADV_DONTNEED)
        done += count


class Follower:
    """The sha256 of a file that is being filled, made behind the writing as far as there is no gap.

    Args:
        path: The file.
        size_bytes: Its length when it is full.
        segment_bytes: Bytes of a segment.
        there: Segments that are there already.
    """

    def __init__(self, path: Path, size_bytes: int, segment_bytes: int, there: frozenset[int]) -> None:
        self._path, self._size_bytes, self._segment_bytes = path, size_bytes, segment_bytes
        self._there, self._stopped = set(there), False
        self._news = threading.Condition()
        self._sha256 = hashlib.sha256()
        self._error: DataError | None = None
        self._thread = threading.Thread(target=self._work, name="sha256", daemon=True)
        self._thread.start()

    def arrived(self, number: int) -> None:
        """Take note that a segment was written."""
        with self._news:
            self._there.add(number)
            self._news.notify()

    def stop(self) -> None:
        """End, wherever it is."""
        with self._news:
            self._stopped = True
            self._news.notify()
        self._thread.join()

    def digest(self) -> str:
        """Return the digest, once every segment has arrived.

        Raises:
            DataError: The file cannot be read.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._sha256.hexdigest()

    def _work(self) -> None:
        number = position = 0
        try:
            block = memoryview(bytearray(HASH_BLOCK_BYTES))
            while position < self._size_bytes and self._is_there(number):
                with self._path.open("rb", buffering=0) as stream:
                    stream.seek(position)
                    end = min((number + 1) * self._segment_bytes, self._size_bytes)
                    while position < end:
                        count = stream.readinto(block[: end - position])
                        if not count:
                            raise OSError(f"{self._path} ends at byte {position}")
                        self._sha256.update(block[:count])
                        position += count
                number += 1
        except BaseException as exc:  # noqa: BLE001 - in a thread: the digest of a part would be taken for that of the file
            self._error = DataError(f"cannot hash {self._path}: {_said(exc)}", "check the node's disk and memory")

    def _is_there(self, number: int) -> bool:
        with self._news:
            self._news.wait_for(lambda: self._stopped or number in self._there)
            return not self._stopped
