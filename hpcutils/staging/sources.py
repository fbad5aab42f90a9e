"""Where bytes come from: a server or a file, opened at an offset and read into the caller's buffer."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcutils.errors import DataError, SpecError


class Broken(Exception):
    """The origin failed in a way that another try may mend. It never leaves this room.

    Args:
        message: What happened.
        start_over: What arrived so far is of no use: ask for the whole file.
        wait_s: Seconds that the server asked to be left alone.
    """

    def __init__(self, message: str, *, start_over: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.start_over = start_over
        self.wait_s = wait_s


@dataclass(frozen=True)
class Resume:
    """Where to go on: the bytes that are there, and the mark by which the server knows that the file is the same.

    With `stop_bytes` only what is before that place is asked for.
    """

    offset: int
    validator: str
    total_bytes: int | None
    stop_bytes: int | None = None


@dataclass(frozen=True)
class Source:
    """An origin that is open.

    Args:
        read_into: Fills a buffer as far as it can and returns the number of bytes; 0 is the end. May raise `Broken`.
        close: Called once.
        offset: Place in the file of the first byte that `read_into` gives.
        total_bytes: Length of the whole file, `None` where the origin does not say.
        validator: What a later `Resume` needs; `None` where the origin gives nothing to go by.
    """

    read_into: Callable[[memoryview], int]
    close: Callable[[], None]
    offset: int = 0
    total_bytes: int | None = None
    validator: str | None = None


# (origin, where to go on or None, seconds of silence before giving up) -> an open source. May raise `Broken`.
Opener = Callable[[str, Resume | None, float], Source]


def open_path(path: Path) -> Source:
    """Open a file that this machine can see.

    Raises:
        DataError: It is not there, is a folder, or may not be read.
    """
    try:
        stream = path.open("rb", buffering=0)
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror}", "check the path, and that this node mounts it") from exc
    return Source(stream.readinto, stream.close, total_bytes=os.fstat(stream.fileno()).st_size)


def open_file_url(origin: str, resume: Resume | None, timeout_s: float) -> Source:
    """Open `file:///path`, `file://localhost/path` or a plain path."""
    if "://" not in origin and not origin.lower().startswith("file:"):
        return open_path(Path(origin))
    parts = urllib.parse.urlsplit(origin)
    if parts.netloc not in ("", "localhost"):
        raise SpecError(f"{origin}: the file is on {parts.netloc!r}", "write file:///path, with three slashes")
    return open_path(Path(urllib.parse.unquote(parts.path)))


def opener_for(origin: str, also: Mapping[str, Opener] | None = None) -> Opener:
    """Return what opens `origin`.

    Args:
        origin: An http, https or file URL, or a plain path.
        also: Openers of further schemes; nothing but the three is opened unless it is asked for here.

    Raises:
        SpecError: Another scheme, or a URL that holds a password.
    """
    scheme = "" if origin.startswith("/") else urllib.parse.urlsplit(origin).scheme.lower()
    openers: dict[str, Opener] = {"": open_file_url, "file": open_file_url, **(also or {})}
    if scheme in ("http", "https") and scheme not in openers:
        _check_address(origin)
        # 40 ms of imports that a file does not need.
        from hpcutils.staging.web import open_web

        return open_web
    if not origin or scheme not in openers:
        raise SpecError(f"cannot fetch {origin!r}: not an http, https or file URL", "check the origin's spelling")
    return openers[scheme]


def _check_address(origin: str) -> None:
    parts = urllib.parse.urlsplit(origin)
    if "@" in parts.netloc:
        raise SpecError(f"{shown(origin)}: a name and a password in a URL are not sent", "use a signed URL")
    try:
        host = parts.hostname and (parts.port, parts.hostname)
    except ValueError as exc:
        raise SpecError(f"{shown(origin)}: {exc}", "a URL reads https://host:port/path") from exc
    if not host:
        raise SpecError(f"{origin!r} names no host", "a URL reads https://host:port/path")


def shown(origin: str) -> str:
    """Return `origin` as it may stand in a log: a query or a password may be a secret."""
    parts = urllib.parse.urlsplit(origin)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
