"""What a dataset is made of, as a text that is written and read line by line: a file, or a million of them.

    {"format": "hpcutils-manifest-1", "segment_bytes": 67108864}
    {"path": "a/train.h5", "size": 268435456, "sha256": "9f86…", "segments": ["0d3c…", "77aa…", "b01f…", "58e2…"]}
    {"path": "a/labels.csv", "size": 4096, "sha256": "60cf…"}
    {"files": 2, "size": 268439552, "tail": "1c9b…"}

Segments cut the files, put one behind the other in the order of the lines, into equal parts: a large file is split, small ones are
packed. A line has the digests (xxh3_128) of the segments that end in its file; the rest, if any, is the last line's `tail`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeGuard

from hpcutils import fs
from hpcutils.errors import DataError, SpecError
from hpcutils.hashing import digest_file
from hpcutils.staging.ahead import ahead
from hpcutils.staging.archive import DEEPEST_FOLDER
from hpcutils.staging.find import Found
from hpcutils.staging.names import Names

FORMAT = "hpcutils-manifest-1"
SEGMENT_BYTES = 64 << 20
LARGEST_SEGMENT_BYTES = 1 << 30
BLOCK_BYTES = 1 << 20
# The last line is found from the end: it is never longer than this.
LAST_LINE_BYTES = 4096
# Larger files are read by a thread of their own while the digests are made.
AHEAD_FROM_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a dataset.

    Args:
        path: Its place below the dataset's folder, with `/` between the parts.
        size_bytes: Its length.
        sha256: Its digest, or `None` where only its segments are known.
        segments: Digests of the segments that end in this file.
    """

    path: str
    size_bytes: int
    sha256: str | None = None
    segments: tuple[str, ...] = ()

    def line(self) -> str:
        """Return the entry as a line of a manifest."""
        value: dict[str, Any] = {"path": self.path, "size": self.size_bytes}
        value |= {"sha256": self.sha256} if self.sha256 is not None else {}
        value |= {"segments": self.segments} if self.segments else {}
        return json.dumps(value, separators=(",", ":")) + "\n"


@dataclass(frozen=True)
class Total:
    """The last line of a manifest.

    Args:
        files: Number of files.
        size_bytes: Bytes of all of them.
        tail: Digest of what comes after the last full segment; `None` when nothing does.
    """

    files: int
    size_bytes: int
    tail: str | None


@dataclass(frozen=True)
class Manifest:
    """A manifest on disk, whose first and last line have been read.

    Args:
        path: The file.
        segment_bytes: Bytes of a segment, but for the last one.
        total: Its last line.
    """

    path: Path
    segment_bytes: int
    total: Total

    @property
    def segments(self) -> int:
        """Number of segments."""
        return self.total.size_bytes // self.segment_bytes + (self.total.tail is not None)

    def digest(self) -> str:
        """Return the sha256 of the manifest itself: what the dataset is known by."""
        return digest_file(self.path)

    def _unchecked(self) -> Iterator[Entry]:
        """Yield files that were checked before, up to a line that was not."""
        with read_lines(self.path) as stream:
            next(stream)
            for number, line in enumerate(stream, start=2):
                yield _entry(self.path, number, _value(self.path, number, line))

    def entries(self) -> Iterator[Entry]:
        """Yield the files in order; each line is checked when its turn comes.

        Raises:
            SpecError: A line is not as it must be; the message begins with `file:line:`.
        """
        with read_lines(self.path) as stream:
            next(stream)
            files = position = 0
            left = False
            names = Names(lambda: islice((entry.path for entry in self._unchecked()), files))
            for number, line in enumerate(stream, start=2):
                value = _value(self.path, number, line)
                if "files" in value:
                    _check_total(self, number, value, (files, position), left, next(stream, None))
                    return
                entry = _entry(self.path, number, value)
                if (wrong := names.trouble(entry.path)) is not None:
                    raise _wrong(self.path, number, f"path: {entry.path!r} {wrong}")
                due = (position + entry.size_bytes) // self.segment_bytes - position // self.segment_bytes
                if len(entry.segments) != due:
                    raise _wrong(self.path, number, f"{due} segments end in {entry.path!r}, and {len(entry.segments)} are listed")
                files, position = files + 1, position + entry.size_bytes
                left = not entry.size_bytes or position % self.segment_bytes != 0
                yield entry
        raise _wrong(self.path, files + 2, "the last line, with the totals, is missing: the file was cut off")


@contextlib.contextmanager
def read_lines(path: Path) -> Iterator[Iterator[str]]:
    """Open a manifest, and yield its lines as they are.

    Raises:
        SpecError: It cannot be read.
    """
    try:
        with open(path, encoding="ascii", errors="surrogateescape", opener=fs.plain) as stream:
            yield stream
    except OSError as exc:
        raise SpecError(f"cannot read the manifest {path}: {exc.strerror}") from exc


def read_entry(path: Path, number: int, line: str) -> Entry | None:
    """Return the file that a line lists; `None` for the line with the totals.

    Raises:
        SpecError: The line is not as it must be; the message begins with `file:line:`.
    """
    value = _value(path, number, line)
    return None if "files" in value else _entry(path, number, value)


def read_manifest(path: Path) -> Manifest:
    """Read the first and the last line of a manifest, and nothing between.

    Raises:
        SpecError: It is no manifest, or was cut off.
    """
    try:
        with open(path, "rb", opener=fs.plain) as stream:
            first = stream.readline(LAST_LINE_BYTES)
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - LAST_LINE_BYTES))
            last = stream.read().rstrip(b"\n").rpartition(b"\n")[2]
    except OSError as exc:
        raise SpecError(f"cannot read the manifest {path}: {exc.strerror}") from exc
    head = _value(path, 1, first.decode(errors="replace"))
    size = head.get("segment_bytes")
    if head.get("format") != FORMAT or not _is_count(size) or size == 0:
        raise _wrong(path, 1, f"no {FORMAT}, or no segment_bytes", "make it with 'hpcutils stage manifest'")
    if size > LARGEST_SEGMENT_BYTES:
        raise _wrong(path, 1, f"segment_bytes: at most 1 GiB was expected, got {size}", "each node holds eight segments in memory")
    try:
        value = json.loads(last)
        return Manifest(path, size, _total(value))
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        with read_lines(path) as lines:
            count = sum(1 for _ in lines)
        raise _wrong(
            path, count, "the last line is not the one with the totals: the file was cut off", "make or copy it again"
        ) from exc


def _total(value: dict[str, Any]) -> Total:
    files, size, tail = value["files"], value["size"], value["tail"]
    if not (_is_count(files) and _is_count(size) and (tail is None or _is_digest(tail, 32))):
        raise ValueError(value)
    return Total(files, size, tail)


def _check_total(
    manifest: Manifest, number: int, value: dict[str, Any], counted: tuple[int, int], left: bool, after: str | None
) -> None:
    """Hold the totals against the lines; `left` says that something comes after the last full segment."""
    if after is not None:
        raise _wrong(manifest.path, number + 1, "something follows the line with the totals")
    if (value.get("files"), value.get("size")) != counted:
        said = f"{value.get('files')} files and {value.get('size')} bytes"
        raise _wrong(manifest.path, number, f"the totals say {said}; the lines above, {counted[0]} and {counted[1]}")
    if left != (manifest.total.tail is not None):
        raise _wrong(manifest.path, number, f"tail: {'a digest' if left else 'null'} was expected, got {manifest.total.tail!r}")


def _value(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise _wrong(path, number, f"no JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise _wrong(path, number, "a JSON object was expected")
    return value


def _entry(path: Path, number: int, value: dict[str, Any]) -> Entry:
    unknown = value.keys() - {"path", "size", "sha256", "segments"}
    if unknown:
        raise _wrong(path, number, f"unknown key {sorted(unknown)[0]!r}")
    name, size, sha256, segments = value.get("path"), value.get("size"), value.get("sha256"), value.get("segments", [])
    if not isinstance(name, str) or not is_safe(name):
        raise _wrong(path, number, f"path: a relative path without '..' was expected, got {name!r}")
    if name.count("/") > DEEPEST_FOLDER:
        raise _wrong(path, number, f"path: no more than {DEEPEST_FOLDER} folders were expected, got {name.count('/')}")
    if not _is_count(size):
        raise _wrong(path, number, f"size: a number of bytes was expected, got {size!r}")
    if sha256 is not None and not _is_digest(sha256, 64):
        raise _wrong(path, number, f"sha256: 64 hexadecimal digits were expected, got {sha256!r}")
    if not isinstance(segments, list) or not all(_is_digest(each, 32) for each in segments):
        raise _wrong(path, number, "segments: a list of digests of 32 hexadecimal digits was expected")
    return Entry(name, size, sha256, tuple(segments))


def is_safe(name: str) -> bool:
    """Say whether a path stays below the folder that it is put into, and is written in the only way it may be."""
    if not name.isascii():
        try:
            os.fsencode(name)
        except UnicodeEncodeError:
            return False
    return bool(name) and "\0" not in name and not any(part in ("", ".", "..") for part in name.split("/"))


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_digest(value: Any, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and not value.strip("0123456789abcdef")


def _wrong(path: Path, number: int, what: str, hint: str | None = None) -> SpecError:
    return SpecError(f"{path}:{number}: {what}", hint)


class Cutter:
    """Makes the digests of segments from bytes in order."""

    def __init__(self, segment_bytes: int) -> None:
        import xxhash

        self._new, self._segment_bytes = xxhash.xxh3_128, segment_bytes
        self._state, self._filled, self._open = self._new(), 0, False

    def touch(self) -> None:
        """Take note of a file: an empty one after the last full segment makes a segment of its own."""
        self._open = True

    def add(self, block: memoryview) -> list[str]:
        """Take bytes; return the digests of the segments that they complete."""
        done = []
        while block:
            part = block[: self._segment_bytes - self._filled]
            self._state.update(part)
            self._filled += len(part)
            block = block[len(part) :]
            if self._filled == self._segment_bytes:
                done.append(self._state.hexdigest())
                self._state, self._filled, self._open = self._new(), 0, False
            else:
                self._open = True
        return done

    def tail(self) -> str | None:
        """Return the digest of what is left, or `None`."""
        return self._state.hexdigest() if self._open else None


def write_manifest(files: Iterable[Found], target: Path, segment_bytes: int = SEGMENT_BYTES) -> Manifest:
    """Read every file once and write the manifest of them all, in the order given.

    Args:
        files: For instance of `find_files`.
        target: The manifest; it appears when it is complete. It is no part of what it lists, also where it lies among the files.
        segment_bytes: Bytes of a segment.

    Raises:
        DataError: A file cannot be read, or two have the same name.
    """
    cutter, count, size = Cutter(segment_bytes), 0, 0
    with fs.publishing(target) as temporary, temporary.open("w", encoding="ascii") as stream:
        stream.write(json.dumps({"format": FORMAT, "segment_bytes": segment_bytes}) + "\n")
        own = _identities(temporary, target)
        names = Names(lambda: _paths_in(temporary, stream))
        for file in files:
            if own & _identities(file.path):
                continue
            if (wrong := names.trouble(file.name)) is not None:
                raise DataError(f"{file.name!r} {wrong}", "name it, or the folder that it is in, once")
            entry = _listed(file, cutter)
            stream.write(entry.line())
            count, size = count + 1, size + entry.size_bytes
        stream.write(json.dumps({"files": count, "size": size, "tail": cutter.tail()}) + "\n")
    return read_manifest(target)


def _paths_in(unfinished: Path, writer: TextIO) -> Iterator[str]:
    writer.flush()
    with unfinished.open(encoding="ascii") as stream:
        next(stream)
        yield from (json.loads(line)["path"] for line in stream)


def _identities(*paths: Path) -> set[tuple[int, int]]:
    """Return what the files are whatever they are called; one that is not there is none."""
    found = set()
    for path in paths:
        with contextlib.suppress(OSError):
            facts = path.stat()
            found.add((facts.st_dev, facts.st_ino))
    return found


def _listed(file: Found, cutter: Cutter) -> Entry:
    sha256, size, done = hashlib.sha256(), 0, []
    cutter.touch()
    try:
        for block in _blocks(file.path):
            sha256.update(block)
            done += cutter.add(memoryview(block))
            size += len(block)
    except OSError as exc:
        raise DataError(f"cannot read {file.path}: {exc.strerror}") from exc
    return Entry(file.name, size, sha256.hexdigest(), tuple(done))


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb", buffering=0, opener=fs.plain) as stream:
        blocks = iter(lambda: stream.read(BLOCK_BYTES), b"")
        large = os.fstat(stream.fileno()).st_size >= AHEAD_FROM_BYTES
        yield from ahead(blocks, 4) if large else blocks
