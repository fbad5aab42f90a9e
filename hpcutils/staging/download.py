"""Move one file from its origin to a place of ours: whole, verified and flushed, or not at all.

origin ─► source (web, file) ─► block ─► thread: temporary file, digest
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from hpcutils import fs
from hpcutils.errors import DataError, IntegrityError, SpecError
from hpcutils.hashing import DIGEST_LENGTHS
from hpcutils.log import LOGGER
from hpcutils.staging.progress import Progress, Silent
from hpcutils.staging.sources import Broken, Opener, Resume, Source, opener_for, shown

# Blocks in flight: one is read, one is written and hashed, and either side may run ahead for a moment. Larger ones are no
# faster; a connection that is reset loses the block that was being read.
BLOCK_BYTES = 1 << 18
BLOCKS = 8
# How much is sent on its way to the disk at once: what is left for the flush at the end takes 5 ms instead of 130 (256 MiB).
WRITE_BACK_BYTES = 8 << 20


@dataclass(frozen=True)
class Patience:
    """How long a transfer puts up with a bad origin.

    Args:
        tries: Failures in a row, with no new byte between them, after which it gives up.
        first_wait_s: Seconds before the second try; each further one waits twice as long.
        longest_wait_s: Upper bound of a wait, also of one that the server asks for.
        timeout_s: Seconds of silence after which a connection counts as broken.
    """

    tries: int = 5
    first_wait_s: float = 0.25
    longest_wait_s: float = 60.0
    timeout_s: float = 30.0

    def wait_s(self, failures: int, asked_s: float) -> float:
        """Return the seconds to wait after `failures` failures: spread, or a thousand ranks would knock at once."""
        grown_s = self.first_wait_s * 2.0 ** (failures - 1) * random.uniform(0.5, 1.0)
        return min(max(grown_s, asked_s), self.longest_wait_s)


@dataclass(frozen=True)
class FetchResult:
    """What a transfer did.

    Args:
        bytes_moved: Bytes that arrived from the origin, those of parts that had to be thrown away included.
        digest: Lower-case hexadecimal digest of the file.
        resumed: Whether a broken connection was continued where it broke.
    """

    bytes_moved: int
    digest: str
    resumed: bool


class Writer:
    """Writes and hashes blocks in a thread of its own.

    hashlib and the kernel let go of the interpreter's lock, so that reading goes on meanwhile.

    Args:
        descriptor: The file, open at its beginning.
        algorithm: Of the digest.
    """

    def __init__(self, descriptor: int, algorithm: str) -> None:
        self._descriptor = descriptor
        self._state = hashlib.new(algorithm)
        self._done_bytes = self._sent_bytes = 0
        self._failure: OSError | None = None
        self._full: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._blocks = 0
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (filled := self._full.get()) is not None:
            # After a failure blocks still go round: whoever waits for one is to learn of it.
            if self._failure is None:
                try:
                    self._add(filled)
                except OSError as exc:
                    self._failure = exc
            self._free.put(memoryview(filled.obj))

    def _add(self, filled: memoryview) -> None:
        written = 0
        while written < len(filled):
            written += os.write(self._descriptor, filled[written:])
        self._state.update(filled)
        self._done_bytes += written
        if self._done_bytes - self._sent_bytes >= WRITE_BACK_BYTES:
            self._write_back()

    def _write_back(self) -> None:
        # Linux starts to write dirty pages that it is told nobody needs; being dirty they stay in memory all the same.
        # A hint only: a file system that does not know it leaves the work to the flush.
        with contextlib.suppress(OSError):
            count = self._done_bytes - self._sent_bytes
            os.posix_fadvise(self._descriptor, self._sent_bytes, count, os.POSIX_FADV_DONTNEED)
        self._sent_bytes = self._done_bytes

    def free_block(self) -> memoryview:
        """Return a block to fill; waits while all are still to be written, which bounds the memory.

        Raises:
            OSError: An earlier block could not be written.
        """
        if self._failure is not None:
            raise self._failure
        if self._blocks < BLOCKS and self._free.empty():
            self._blocks += 1
            return memoryview(bytearray(BLOCK_BYTES))
        return self._free.get()

    def take(self, filled: memoryview) -> None:
        """Write and hash `filled`, the beginning of a block, after all that came before it."""
        self._full.put(filled)

    def stop(self) -> None:
        """Do what was taken and end the thread; may be called again."""
        self._full.put(None)
        self._thread.join()

    def digest(self) -> str:
        """Stop, and return the digest of everything taken.

        Raises:
            OSError: A block could not be written.
        """
        self.stop()
        if self._failure is not None:
            raise self._failure
        return self._state.hexdigest()


class Sink:
    """The file that is being filled, and the digest of what is in it."""

    def __init__(self, path: Path, algorithm: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._algorithm = algorithm
        self._writer = Writer(self._file, algorithm)
        self._block = self._writer.free_block()
        self._total_bytes: int | None = None
        self._validator: str | None = None
        self.size_bytes = self.moved_bytes = 0
        self.resumed = False

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._writer.stop()
        os.close(self._file)

    def resume_point(self) -> Resume | None:
        """Return where to go on, or `None` when there is nothing to keep or nothing to know the file by."""
        if self.size_bytes == 0 or self._validator is None:
            return None
        return Resume(self.size_bytes, self._validator, self._total_bytes)

    def forget(self) -> None:
        """Ask for the whole file the next time."""
        self._validator = None

    def fill_from(self, source: Source, progress: Progress) -> None:
        """Append what `source` gives, up to its end.

        Raises:
            Broken: It ended early.
        """
        self._begin(source)
        while self._move_block(source):
            progress.update(self.size_bytes, self._total_bytes)
        if self._total_bytes not in (None, self.size_bytes):
            raise Broken(f"{self.size_bytes} bytes came of {self._total_bytes}")

    def _begin(self, source: Source) -> None:
        self._total_bytes, self._validator = source.total_bytes, source.validator
        if source.offset:
            self.resumed = True
        elif self.size_bytes:
            self._restart()

    def _restart(self) -> None:
        self._writer.stop()
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        self._writer = Writer(self._file, self._algorithm)
        self._block = self._writer.free_block()
        self.size_bytes, self.resumed = 0, False

    def _move_block(self, source: Source) -> int:
        """Read one block and hand it on; return its bytes. A connection that breaks leaves all as it was before."""
        count = source.read_into(self._block)
        if count:
            self._writer.take(self._block[:count])
            self._block = self._writer.free_block()
            self.size_bytes += count
            self.moved_bytes += count
        return count

    def digest(self) -> str:
        """Return the digest of the file; nothing may be added afterwards.

        Raises:
            OSError: It could not be written.
        """
        return self._writer.digest()


def fetch(
    origin: str,
    target: Path,
    *,
    digest: str | None = None,
    algorithm: str = "sha256",
    progress: Progress | None = None,
    patience: Patience | None = None,
    also: Mapping[str, Opener] | None = None,
) -> FetchResult:
    """Bring `origin` to `target`: under a temporary name beside it, verified and flushed before it gets its own.

    Args:
        origin: An http, https or file URL, or a plain path.
        target: The file to make or to replace; the old one stays until the new one is verified.
        digest: Expected hexadecimal digest, in either case; `None` accepts any.
        algorithm: Of `digest`, and of the digest returned: md5, sha1, sha256 or sha512.
        progress: What shows how far it is; `None` shows nothing.
        patience: Tries, waits and timeouts in seconds; `None` is `Patience()`.
        also: Openers of further schemes, for instance `{"ftp": open_ftp}`.

    Returns:
        The bytes moved, the digest and whether a broken connection was resumed.

    Raises:
        IntegrityError: The bytes have another digest. Nothing is left behind.
        DataError: The origin cannot be had, or the target cannot be written. Nothing is left behind.
        SpecError: The origin, the digest or the algorithm cannot be read as meant.

    Example:
        fetch("https://example.org/x.h5", Path("/local/x.h5"), digest="9f86d08…")
    """
    with disk_errors_named(target), fs.publishing(target) as temporary:
        return transfer(origin, temporary, digest=digest, algorithm=algorithm, progress=progress, patience=patience, also=also)


def transfer(
    origin: str,
    path: Path,
    *,
    digest: str | None = None,
    algorithm: str = "sha256",
    progress: Progress | None = None,
    patience: Patience | None = None,
    also: Mapping[str, Opener] | None = None,
) -> FetchResult:
    """Fill `path` as `fetch` does, but leave it there: the caller flushes and renames it, or removes it on failure."""
    check_digest(digest, algorithm)
    opener = opener_for(origin, also)
    with Sink(path, algorithm) as sink, contextlib.closing(progress or Silent()) as shows:
        _fill(sink, opener, origin, patience or Patience(), shows)
        found = sink.digest()
    if digest is not None and found != digest.lower():
        raise IntegrityError(
            f"{shown(origin)}: {algorithm} of the {sink.size_bytes} bytes that came is {found}, not {digest.lower()}",
            "the file at the origin is another one, or the digest was mistyped; nothing was kept",
        )
    return FetchResult(sink.moved_bytes, found, sink.resumed)


def _fill(sink: Sink, opener: Opener, origin: str, patience: Patience, progress: Progress) -> None:
    """Fill `sink`, in as many tries as it takes while each brings something new."""
    failures = furthest_bytes = 0
    while True:
        try:
            with contextlib.closing(opener(origin, sink.resume_point(), patience.timeout_s)) as source:
                sink.fill_from(source, progress)
                return
        except Broken as exc:
            if exc.start_over:
                sink.forget()
            failures = 1 if sink.size_bytes > furthest_bytes else failures + 1
            furthest_bytes = max(furthest_bytes, sink.size_bytes)
            if failures >= patience.tries:
                raise DataError(
                    f"{shown(origin)}: gave up after {failures} tries without a new byte, at byte {sink.size_bytes}: {exc}",
                    "check the network and the origin; compute nodes often need the https_proxy variable",
                ) from exc
            _wait(patience.wait_s(failures, exc.wait_s), origin, exc, sink.size_bytes)


def _wait(wait_s: float, origin: str, exc: Broken, size_bytes: int) -> None:
    LOGGER.warning("%s: %s; at byte %d, trying again in %.1f s", shown(origin), exc, size_bytes, wait_s)
    time.sleep(wait_s)


def check_digest(digest: str | None, algorithm: str) -> None:
    """Refuse an algorithm that is not known, and a digest that it cannot have given.

    Raises:
        SpecError: With the lengths that were expected.
    """
    if algorithm not in DIGEST_LENGTHS:
        raise SpecError(f"unknown hash algorithm {algorithm!r}", f"one of: {', '.join(DIGEST_LENGTHS)}")
    if digest is None:
        return
    if len(digest) != DIGEST_LENGTHS[algorithm] or not set(digest.lower()) <= set("0123456789abcdef"):
        raise SpecError(
            f"not a {algorithm} digest: {digest!r} ({len(digest)} characters)",
            f"{DIGEST_LENGTHS[algorithm]} hexadecimal digits expected",
        )


@contextlib.contextmanager
def disk_errors_named(target: Path) -> Iterator[None]:
    """Turn what the operating system says about folders and disks into an error that names `target`.

    Raises:
        DataError: For every `OSError` inside.
    """
    try:
        yield
    except OSError as exc:
        raise DataError(
            f"cannot put {target} in place: {exc.strerror or exc}" + (f" ({exc.filename})" if exc.filename else ""),
            "check the space and the rights there, or give another cache_dir (KERAS_HOME)",
        ) from exc
