"""From the lines of a manifest to segments: which bytes of which files each is made of. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hpcutils.staging.manifest import Entry


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one file in a segment.

    Args:
        path: The file, below the dataset's folder.
        file_bytes: The whole file's length.
        offset: Where the part begins in the file.
        at: Where it begins in the segment.
        size_bytes: Its length; 0 for an empty file.
    """

    path: str
    file_bytes: int
    offset: int
    at: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Segment:
    """What is moved and proved as one.

    Args:
        number: From 0.
        size_bytes: Its length.
        digest: What it must hash to (xxh3_128), or `None` where nobody said.
        pieces: Where its bytes go.
    """

    number: int
    size_bytes: int
    digest: str | None
    pieces: tuple[Piece, ...]


def cut(entries: Iterable[Entry], segment_bytes: int, tail: str | None = None, *, known: bool = True) -> Iterator[Segment]:
    """Yield the segments of `entries` in order, holding one at a time.

    Args:
        entries: The files in order.
        segment_bytes: Bytes of each segment but the last.
        tail: Digest of the last one.
        known: Whether the entries have digests of segments; without, every segment's digest is `None`.
    """
    number, filled = 0, 0
    pieces: list[Piece] = []
    for entry in entries:
        digests = iter(entry.segments)
        offset = 0
        while True:
            size = min(entry.size_bytes - offset, segment_bytes - filled)
            if size or not entry.size_bytes:
                pieces.append(Piece(entry.path, entry.size_bytes, offset, filled, size))
            offset, filled = offset + size, filled + size
            if filled == segment_bytes:
                yield Segment(number, filled, next(digests) if known else None, tuple(pieces))
                number, filled, pieces = number + 1, 0, []
            if offset == entry.size_bytes:
                break
    if pieces:
        yield Segment(number, filled, tail, tuple(pieces))
