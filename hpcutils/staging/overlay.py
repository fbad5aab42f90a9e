"""A file that is on its way to this node, to be read already: from the disk what has landed, from its source what has not.

Which segments are there is told by the sidecar of the partial that the node's leader fills: a line is written to it when a
segment's bytes are. The other ranks of the node read along; nothing is sent to them.

What was read through is proved afterwards: its digests are kept, and compared with the file that came.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from hpcutils.errors import DataError, IntegrityError
from hpcutils.staging.load import digest_of
from hpcutils.staging.origins import Origin, WebOrigin, origin_of
from hpcutils.staging.segments import Piece
from hpcutils.staging.store import FILES, SEGMENTS

# HDF5 reads its own structures a few bytes at a time: read through, such a read brings the block around it.
SMALL_BYTES, BLOCK_BYTES, BLOCKS = 4 << 10, 16 << 10, 256
SIDECAR_STEP_BYTES = 64 << 10


@dataclass(frozen=True)
class Arriving:
    """A file of a dataset that is being moved to this node. A value: the leader gives it to the node's other ranks.

    Args:
        path: The file, in the dataset.
        size_bytes: Its length.
        begin_bytes: Where it begins in the dataset, all files one behind the other.
        segment_bytes: Bytes of a segment.
        partial: The folder that is being filled.
        entry: The folder that it will become.
        base: The source: see `origin_of`.
        single: See `origin_of`.
    """

    path: str
    size_bytes: int
    begin_bytes: int
    segment_bytes: int
    partial: Path
    entry: Path
    base: str
    single: bool


class Overlay:
    """The bytes of such a file; several threads may read.

    Args:
        file: Which.
        origin: Its source; `None` opens the one that it names.

    Attributes:
        size_bytes: Its length.
        read_through_bytes: Bytes that were read from its source.
    """

    def __init__(self, file: Arriving, origin: Origin | None = None) -> None:
        self.file, self.size_bytes, self.read_through_bytes = file, file.size_bytes, 0
        self._origin = origin or origin_of(file.base, bounded=True, single=file.single)
        self._landed: set[int] = set()
        self._sidecar = self._disk = -1
        # How far the sidecar was read, a line that is not whole yet, and whether its first line was right.
        self._told_bytes, self._told, self._begun = 0, b"", False
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        # Place, length and digest of every read of the source.
        self._seen: list[tuple[int, int, str]] = []
        self._lock = threading.Lock()
        self._turn = threading.Lock() if self._origin.threads == 1 else contextlib.nullcontext()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on.

        Raises:
            DataError: The source or the disk cannot be read.
        """
        done, segment_bytes = 0, self.file.segment_bytes
        while done < len(buffer):
            place = self.file.begin_bytes + offset + done
            number = place // segment_bytes
            part = buffer[done : done + (number + 1) * segment_bytes - place]
            if not (self._is_here(number) and self._from_disk(offset + done, part)):
                self._read_through(offset + done, part)
            done += len(part)

    def _is_here(self, number: int) -> bool:
        if number in self._landed:
            return True
        with self._lock:
            self._look()
        return number in self._landed

    def _look(self) -> None:
        """Read on in the sidecar; a line counts when it is whole."""
        self._sidecar = self._sidecar if self._sidecar >= 0 else self._opened(SEGMENTS)
        while self._sidecar >= 0 and (more := os.pread(self._sidecar, SIDECAR_STEP_BYTES, self._told_bytes)):
            *lines, rest = (self._told + more).split(b"\n")
            if lines and not self._begun and lines.pop(0) != b"%d" % self.file.segment_bytes:
                # Another process was faster, and cut the same dataset into other segments: its folder is complete.
                return
            self._begun = self._begun or self._told_bytes + len(more) > len(rest)
            self._told_bytes, self._told = self._told_bytes + len(more), rest
            self._landed.update(int(line.partition(b" ")[0]) for line in lines)

    def _opened(self, name: str) -> int:
        """Return a descriptor of a file of the partial, or of what it has become; -1 when there is none yet."""
        for folder in (self.file.partial, self.file.entry):
            with contextlib.suppress(FileNotFoundError):
                # It stays the same file when the folder gets its name.
                descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
                weakref.finalize(self, os.close, descriptor)
                return descriptor
        return -1

    def _from_disk(self, offset: int, buffer: memoryview) -> bool:
        """Read what has landed; says whether it could."""
        if self._disk < 0:
            with self._lock:
                self._disk = self._disk if self._disk >= 0 else self._opened(f"{FILES}/{self.file.path}")
        return self._disk >= 0 and _fill(self._disk, offset, buffer)

    def _read_through(self, offset: int, buffer: memoryview) -> None:
        if len(buffer) > SMALL_BYTES:
            self._from_source(offset, buffer)
            return
        done = 0
        while done < len(buffer):
            number, inside = divmod(offset + done, BLOCK_BYTES)
            part = self._block(number)[inside : inside + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)

    def _block(self, number: int) -> bytes:
        with self._lock:
            if number in self._blocks:
                self._blocks.move_to_end(number)
                return self._blocks[number]
        block = bytearray(min(BLOCK_BYTES, self.size_bytes - number * BLOCK_BYTES))
        self._from_source(number * BLOCK_BYTES, memoryview(block))
        with self._lock:
            self._blocks[number] = bytes(block)
            if len(self._blocks) > BLOCKS:
                self._blocks.popitem(last=False)
        return bytes(block)

    def _from_source(self, offset: int, buffer: memoryview) -> None:
        with self._turn:
            self._origin.read(Piece(self.file.path, self.size_bytes, offset, 0, len(buffer)), buffer)
        digest = digest_of(buffer)
        with self._lock:
            self.read_through_bytes += len(buffer)
            self._seen.append((offset, len(buffer), digest))

    def close(self) -> None:
        """Let go of the source; nothing is read through any more."""
        self._origin.close()

    def prove(self) -> None:
        """Compare what was read through with the file, now that it is complete.

        Raises:
            IntegrityError: The source gave other bytes than those that arrived and proved right.
            DataError: The file cannot be read.
        """
        path = self.file.entry / FILES / self.file.path
        memory = memoryview(bytearray(max((size for _, size, _ in self._seen), default=0)))
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise DataError(f"cannot read {path}: {exc.strerror}", "the cache was changed while the job ran") from exc
        try:
            for offset, size, digest in sorted(self._seen):
                if not _fill(descriptor, offset, memory[:size]) or digest_of(memory[:size]) != digest:
                    raise IntegrityError(
                        f"{self._origin.where(self.file.path)}: {size} bytes from byte {offset} on were others when training "
                        "read them than those that arrived",
                        "the source changed, or was read wrongly, while the job ran: run it again",
                    )
        finally:
            os.close(descriptor)


def _fill(descriptor: int, offset: int, buffer: memoryview) -> bool:
    """Read from a file until `buffer` is full; says whether the file was long enough."""
    try:
        while buffer:
            count = os.preadv(descriptor, [buffer], offset)
            if count == 0:
                return False
            buffer, offset = buffer[count:], offset + count
    except OSError as exc:
        raise DataError(f"cannot read what was staged: {exc.strerror}", "look at the node's disk") from exc
    return True


def can_be_read_through(file: Arriving) -> bool:
    """Say whether any part of a file can be had at its source alone: a web server may know no ranges."""
    origin = origin_of(file.base, bounded=True, single=file.single)
    with contextlib.closing(origin):
        return not isinstance(origin, WebOrigin) or origin.knows_ranges(file.path, file.size_bytes)
