"""Where a dataset's bytes come from: folders, web servers, anything that fsspec opens. Each can be read at any place."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from hpcutils import fs
from hpcutils.errors import DataError, MissingPartError, SpecError
from hpcutils.log import LOGGER
from hpcutils.staging.download import Patience
from hpcutils.staging.segments import Piece
from hpcutils.staging.sources import Broken, Resume, Source, shown

STEP_BYTES = 1 << 20
WEB = ("http", "https")


class Origin(Protocol):
    """A place to read from.

    Attributes:
        threads: How many may read at once.
    """

    threads: int

    def read(self, piece: Piece, buffer: memoryview) -> None:
        """Fill `buffer` with the piece.

        Raises:
            DataError: It is not there, cannot be read, or has another length than `piece.file_bytes`.
        """

    def size_bytes(self, path: str) -> int | None:
        """Return a file's length; `None` where the origin does not say."""

    def mark(self, path: str) -> str:
        """Ask anew, and return what is another text when the file was changed or replaced meanwhile."""

    def where(self, path: str) -> str:
        """Return how a file is called in messages."""

    def close(self) -> None:
        """Let go of what is open."""


class FolderOrigin:
    """Files that this node can see.

    Args:
        locate: From a path in the dataset to the file.
        follow: A link counts as what it leads to. In the cache none is expected.
    """

    threads = 2

    def __init__(self, locate: Callable[[str], Path], *, follow: bool = True) -> None:
        self._locate = locate
        self._flags = os.O_RDONLY | (0 if follow else os.O_NOFOLLOW)
        # Each thread keeps the last file that it read a part of.
        self._open: dict[int, tuple[str, int]] = {}

    def read(self, piece: Piece, buffer: memoryview) -> None:
        """Fill `buffer`; see `Origin`."""
        try:
            descriptor = self._opened(piece)
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], piece.offset + done)
                if count == 0:
                    raise self._other_length(piece, piece.offset + done)
                done += count
            if piece.size_bytes == piece.file_bytes:
                self._drop(threading.get_ident())
        except OSError as exc:
            raise DataError(
                f"cannot read {self.where(piece.path)}: {exc.strerror}", "data must be on a file system that the nodes can see"
            ) from exc

    def _opened(self, piece: Piece) -> int:
        thread = threading.get_ident()
        path, descriptor = self._open.get(thread, (None, -1))
        if path != piece.path:
            self._drop(thread)
            descriptor = fs.plain(self._locate(piece.path), self._flags)
            self._open[thread] = (piece.path, descriptor)
            length = os.fstat(descriptor).st_size
            if length != piece.file_bytes:
                raise self._other_length(piece, length)
        return descriptor

    def _drop(self, thread: int) -> None:
        _, descriptor = self._open.pop(thread, (None, -1))
        if descriptor >= 0:
            os.close(descriptor)

    def _other_length(self, piece: Piece, length: int) -> DataError:
        return DataError(
            f"{self.where(piece.path)} has {length} bytes; {piece.file_bytes} were expected",
            "it is being written, or changed since it was listed: make its manifest again",
        )

    def size_bytes(self, path: str) -> int | None:
        """Return the file's length."""
        return self._facts(path).st_size

    def mark(self, path: str) -> str:
        """Return what changes with the file's bytes. The time of change cannot be set back, as the time of writing can."""
        facts = self._facts(path)
        return f"{facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"

    def _facts(self, path: str) -> os.stat_result:
        try:
            # Opened: NFS asks its server then, and may answer a bare stat from memory.
            with open(self._locate(path), "rb", buffering=0, opener=fs.plain) as stream:
                return os.fstat(stream.fileno())
        except OSError as exc:
            raise DataError(
                f"no such file: {self.where(path)} ({exc.strerror})", "data must be on a file system that the nodes can see"
            ) from exc

    def where(self, path: str) -> str:
        """Return the file's place."""
        return str(self._locate(path))

    def close(self) -> None:
        """Close what is open; no thread reads any more."""
        for thread in list(self._open):
            self._drop(thread)


class WebOrigin:
    """Files on a web server: asked for by range, in one connection as long as they are read in order.

    Args:
        locate: From a path in the dataset to the URL.
        bounded: Ask for no more than each piece: other nodes read what is between.
        patience: Tries, waits and timeouts.
    """

    threads = 1

    def __init__(self, locate: Callable[[str], str], *, bounded: bool = False, patience: Patience | None = None) -> None:
        self._locate, self._bounded, self._patience = locate, bounded, patience or Patience()
        self._url, self._position = "", 0
        self._validator: str | None = None
        self._total: int | None = None
        self._source: Source | None = None

    def read(self, piece: Piece, buffer: memoryview) -> None:
        """Fill `buffer`; a connection that breaks is taken up where it broke."""
        done = failures = 0
        while done < len(buffer):
            try:
                # In small steps: a connection that breaks loses what it was about to give.
                count = self._at(piece, piece.offset + done).read_into(buffer[done : done + STEP_BYTES])
                if count == 0:
                    raise Broken(f"the server stopped at byte {self._position} of {piece.file_bytes}")
                done, failures, self._position = done + count, 0, self._position + count
            except Broken as exc:
                self.close()
                failures += 1
                self._wait(piece, failures, exc)
        if self._bounded:
            # The answer is used up: who reads on from here must ask again.
            self.close()

    def _wait(self, piece: Piece, failures: int, exc: Broken) -> None:
        where = self.where(piece.path)
        if failures >= self._patience.tries:
            raise DataError(
                f"{where}: gave up after {failures} tries without a new byte: {exc}",
                "check the network and the origin; compute nodes often need the https_proxy variable",
            ) from exc
        wait_s = self._patience.wait_s(failures, exc.wait_s)
        LOGGER.warning("%s: %s; trying again in %.1f s", where, exc, wait_s)
        time.sleep(wait_s)

    def _at(self, piece: Piece, offset: int) -> Source:
        """Return the file's source, at `offset`."""
        url = self._locate(piece.path)
        if self._source is not None and (self._url, self._position) == (url, offset):
            return self._source
        self.close()
        if url != self._url:
            self._url, self._validator = url, None
        if offset and self._validator is None:
            self._look(url)
        resume = None
        if self._validator is not None and (offset or self._bounded):
            stop = piece.offset + piece.size_bytes if self._bounded else None
            resume = Resume(offset, self._validator, self._total, stop)
        self._source = self._opened(url, resume)
        if self._source.total_bytes not in (None, piece.file_bytes):
            raise DataError(
                f"{self.where(piece.path)} has {self._source.total_bytes} bytes; {piece.file_bytes} were expected",
                "it is another file than the one that was listed",
            )
        self._position = self._source.offset
        self._skip(offset)
        return self._source

    def _opened(self, url: str, resume: Resume | None) -> Source:
        from hpcutils.staging.web import open_web

        source = open_web(url, resume, self._patience.timeout_s)
        self._validator, self._total = source.validator, source.total_bytes
        return source

    def _look(self, url: str) -> None:
        """Learn the mark by which a part of the file can be asked for."""
        self._opened(url, None).close()

    def _skip(self, offset: int) -> None:
        """Read up to `offset` from a server that knows no ranges."""
        scratch = memoryview(bytearray(STEP_BYTES))
        while self._source is not None and self._position < offset:
            count = self._source.read_into(scratch[: offset - self._position])
            if count == 0:
                raise Broken("the server stopped early")
            self._position += count

    def size_bytes(self, path: str) -> int | None:
        """Ask for the file, and return its length; who reads from its beginning next goes on in the same answer."""
        failures = 0
        while True:
            try:
                self.close()
                self._url, self._position = self._locate(path), 0
                self._source = self._opened(self._url, None)
                return self._source.total_bytes
            except Broken as exc:
                failures += 1
                self._wait(Piece(path, 0, 0, 0, 0), failures, exc)

    def mark(self, path: str) -> str:
        """Return the server's own mark; where it gives none, the length is all there is."""
        return f"{self.size_bytes(path)} {self._validator}"

    def knows_ranges(self, path: str, total_bytes: int) -> bool:
        """Say whether parts of the file can be had: else one reads it all."""
        if self._validator is None:
            self.size_bytes(path)
        self.close()
        if self._validator is None or total_bytes < 2:
            return False
        with contextlib.suppress(Broken):
            source = self._opened(self._locate(path), Resume(1, self._validator, total_bytes, 2))
            source.close()
            return source.offset == 1
        return False

    def where(self, path: str) -> str:
        """Return the URL as it may stand in a log."""
        return shown(self._locate(path))

    def close(self) -> None:
        """Hang up."""
        if self._source is not None:
            self._source.close()
            self._source = None


class FsspecOrigin:
    """Whatever fsspec opens: s3, gs, ftp, sftp, hdfs, memory.

    Args:
        locate: From a path in the dataset to the URL.

    Raises:
        MissingPartError: fsspec, or what it needs for this scheme, is not installed.
    """

    threads = 1

    def __init__(self, locate: Callable[[str], str]) -> None:
        self._locate = locate
        self._url, self._file = "", None

    def _opened(self, path: str) -> Any:
        url = self._locate(path)
        if self._file is None or url != self._url:
            self.close()
            with _fsspec_errors(shown(url)):
                # Read as asked: its own read-ahead would fetch bytes that other nodes fetch.
                self._url, self._file = url, _fsspec().open(url, "rb", cache_type="none").open()
        return self._file

    def read(self, piece: Piece, buffer: memoryview) -> None:
        """Fill `buffer`; see `Origin`."""
        file = self._opened(piece.path)
        with _fsspec_errors(self.where(piece.path)):
            length = self.size_bytes(piece.path)
            if length not in (None, piece.file_bytes):
                raise DataError(f"{self.where(piece.path)} has {length} bytes; {piece.file_bytes} were expected")
            file.seek(piece.offset)
            done = 0
            while done < len(buffer):
                block = file.read(len(buffer) - done)
                if not block:
                    raise DataError(f"{self.where(piece.path)} ended at byte {piece.offset + done} of {piece.file_bytes}")
                buffer[done : done + len(block)] = block
                done += len(block)

    def size_bytes(self, path: str) -> int | None:
        """Return the file's length."""
        file = self._opened(path)
        with _fsspec_errors(self.where(path)):
            return int(file.seek(0, os.SEEK_END))

    def mark(self, path: str) -> str:
        """Return what fsspec knows a version of a file by."""
        url = self._locate(path)
        with _fsspec_errors(shown(url)):
            system, inside = _fsspec().core.url_to_fs(url)
            system.invalidate_cache()
            return str(system.ukey(inside))

    def where(self, path: str) -> str:
        """Return the URL as it may stand in a log."""
        return shown(self._locate(path))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError as exc:
        raise MissingPartError("a URL that is not http, https or file needs fsspec", "pip install 'hpcutils[fsspec]'") from exc
    return fsspec


@contextlib.contextmanager
def _fsspec_errors(where: str) -> Any:
    try:
        yield
    except ImportError as exc:
        raise MissingPartError(f"{where}: {exc}", "install the package that fsspec names") from exc
    except ValueError as exc:
        raise SpecError(f"{where}: {exc}") from exc
    except OSError as exc:
        raise DataError(f"cannot read {where}: {exc}", "check the URL, and that this node may reach it") from exc


def origin_of(base: str, *, bounded: bool = False, single: bool = False) -> Origin:
    """Return the origin that a path or URL names.

    Args:
        base: A folder, or the URL of one; with `single` the file itself.
        bounded: Several nodes read parts of it.
        single: `base` is the one file of the dataset.
    """
    scheme = "" if base.startswith("/") else urllib.parse.urlsplit(base).scheme.lower()

    def url(path: str) -> str:
        return base if single else f"{base.rstrip('/')}/{urllib.parse.quote(os.fsencode(path))}"

    if scheme in WEB:
        return WebOrigin(url, bounded=bounded)
    if scheme not in ("", "file"):
        return FsspecOrigin(url if single else lambda path: f"{base.rstrip('/')}/{path}")
    folder = Path(urllib.parse.unquote(urllib.parse.urlsplit(base).path) if scheme else base)
    return FolderOrigin(lambda path: folder if single else folder / path)
