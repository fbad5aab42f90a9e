"""Read the members of a tar (plain, gzip, bzip2, xz) or a zip, one after another, believing as little as possible.

Judging and writing them is the concern of `archive`; here nothing is written.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from hpcutils.errors import ArchiveError, DataError

GIB = 1 << 30
COPY_BYTES = 1 << 20
LONGEST_LINK_BYTES = 4096
# What compressed data usually becomes.
USUAL_RATIO = 4
Kind = Literal["file", "folder", "symlink", "hardlink", "other"]
DISTRUST = "the archive is hostile or badly made: ask its publisher, or unpack it by hand in a folder of its own"
UNIX_KINDS: dict[int, Kind] = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "symlink"}
# What the standard readers raise at bytes that make no sense, beside an OSError without a number (gzip, bz2).
DAMAGE = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    EOFError, ValueError, OverflowError, NotImplementedError,
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """How much an archive may become.

    Args:
        unpacked_bytes: Bytes after unpacking; for a tar those of its headers and padding included.
        members: Files, folders and links.
        free_bytes: What the disk has, counted in the same way; `None` lets the disk say when it is full.
    """

    unpacked_bytes: int
    members: int = 10_000_000
    free_bytes: int | None = None

    @classmethod
    def of(cls, archive: Path) -> Limits:
        """Return the usual limits: 50 times the archive's own size, and never less than 4 GiB."""
        return cls(max(4 * GIB, 50 * archive.stat().st_size))

    def check_bytes(self, count: int, what: str) -> None:
        """Refuse an archive that claims, or has become, `count` bytes.

        Raises:
            ArchiveError: That is too much.
            DataError: It is more than the disk has.
        """
        if self.free_bytes is not None and count > self.free_bytes:
            raise DataError(
                f"no room: the archive {what} {count} bytes, and {self.free_bytes} are free", "name a larger disk (staging.cache)"
            )
        if count > self.unpacked_bytes:
            raise ArchiveError(
                f"the archive {what} {count} bytes; {self.unpacked_bytes} are allowed",
                "if you trust it: fetch it without extract=True, then "
                "hpcutils.staging.get_file.extract_once(path, limits=Limits(unpacked_bytes=...))",
            )

    def check_members(self, count: int) -> None:
        """Refuse an archive of more than `members` entries."""
        if count > self.members:
            raise ArchiveError(f"the archive holds more than {self.members} members", "ask for a packed format instead")


@dataclass(frozen=True)
class Member:
    """One entry of an archive, as it claims to be.

    Args:
        name: As written in the archive.
        kind: `other` is a device, a pipe or something unknown.
        size_bytes: Of a file's content.
        mode: Unix mode bits; 0 where the archive has none.
        link: Where a symlink or a hard link points, as written.
        open: Opens a file's content.
    """

    name: str
    kind: Kind
    size_bytes: int
    mode: int
    link: str
    open: Callable[[], io.BufferedIOBase]


def members_of(archive: Path, formats: Sequence[str], limits: Limits, label: str) -> Iterator[Member]:
    """Return the members, each to be used before the next one is asked for.

    Args:
        archive: The file; its name does not matter.
        formats: What to try, in order: `tar`, `zip`.
        limits: What it may become.
        label: What to call it in messages.

    Raises:
        ArchiveError: It is none of `formats`.
    """
    for name in formats:
        if name == "tar" and (opened := _open_tar(archive, limits)) is not None:
            return _tar_members(*opened)
        if name == "zip" and zipfile.is_zipfile(archive):
            return _zip_members(archive, limits)
    raise ArchiveError(
        f"{label} is not a {' or '.join(formats)} archive, or is damaged from the beginning",
        "call without extract=True if it is not meant to be unpacked",
    )


def expected_bytes(archive: Path) -> tuple[int, bool]:
    """Return what an archive will take when it is unpacked, and whether that is known: a compressed tar would have to be read."""
    size_bytes = archive.stat().st_size
    with contextlib.suppress(*DAMAGE), _unpacked(archive) as stream:
        if isinstance(stream, (gzip.GzipFile, bz2.BZ2File, lzma.LZMAFile)):
            return USUAL_RATIO * size_bytes, False
    with contextlib.suppress(*DAMAGE):
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as pack:
                return sum(info.file_size for info in pack.infolist()), True
    return size_bytes, True


@contextlib.contextmanager
def damage_named(label: str) -> Iterator[None]:
    """Turn what the readers of archives raise into `ArchiveError`; a full disk stays an `OSError`."""
    try:
        yield
    except (*DAMAGE, OSError) as exc:
        if not is_damage(exc):
            raise
        message = f"{label} is damaged: {exc or type(exc).__name__}"
        raise ArchiveError(message, "fetch it again, with its file_hash") from exc


def is_damage(exc: BaseException) -> bool:
    """Say whether `exc` is about the bytes that were read, and not about the disk."""
    return not isinstance(exc, OSError) or exc.errno is None


class Forward(io.RawIOBase):
    """Unpacked bytes, from front to back and counted.

    tarfile would read a header of any length into memory and follow negative sizes backwards for ever.
    """

    def __init__(self, stream: IO[bytes], limits: Limits) -> None:
        self._stream, self._limits = stream, limits
        self._place = 0
        self._again = self._newest = b""
        self.last_read = b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= COPY_BYTES:
            raise ArchiveError(f"the archive has a header of {size} bytes; {COPY_BYTES} are allowed", DISTRUST)
        data = self._again[:size] + self._stream.read(max(size - len(self._again), 0))
        self._place += len(data)
        self._limits.check_bytes(self._place, "unpacks to")
        self._again, self._newest, self.last_read = b"", data[-1:] or self._newest, data
        return data

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        # tarfile steps one byte back to see whether the end of a member is there; nothing honest goes further.
        if place == self._place - 1:
            self._again, self._place = self._newest, place
        elif place < self._place:
            raise ArchiveError("the archive has a header with a negative size", DISTRUST)
        while self._place < place and self.read(min(place - self._place, COPY_BYTES)):
            pass
        return self._place

    def tell(self) -> int:
        return self._place

    def close(self) -> None:
        self._stream.close()
        super().close()


def _unpacked(archive: Path) -> IO[bytes]:
    with archive.open("rb") as stream:
        magic = stream.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(archive, "rb"))
    if magic.startswith(b"BZh"):
        return cast(IO[bytes], bz2.open(archive, "rb"))
    if magic == b"\xfd7zXZ\x00":
        return cast(IO[bytes], lzma.open(archive, "rb"))
    return archive.open("rb")


def _open_tar(archive: Path, limits: Limits) -> tuple[tarfile.TarFile, Forward] | None:
    """Return the archive after its first header, or `None` when that is not one of a tar."""
    forward = Forward(_unpacked(archive), limits)
    try:
        return tarfile.open(fileobj=cast(IO[bytes], forward), mode="r:", errorlevel=2), forward
    except (*DAMAGE, OSError) as exc:
        forward.close()
        if not is_damage(exc):
            raise
        return None


def _tar_members(tar: tarfile.TarFile, forward: Forward) -> Iterator[Member]:
    with contextlib.closing(forward), tar:
        while (info := tar.next()) is not None:
            # tarfile keeps every header: a gigabyte for a million files.
            tar.members.clear()  # type: ignore[attr-defined]
            yield _tar_member(tar, info)
        # tarfile takes a header that makes no sense for the end of the archive.
        if forward.last_read.strip(b"\0"):
            raise tarfile.ReadError("a header in the middle makes no sense")
        # The checksum of gzip, bzip2 and xz comes after the last byte.
        while forward.read(COPY_BYTES):
            pass


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    def content() -> io.BufferedIOBase:
        return cast(io.BufferedIOBase, tar.extractfile(info))

    kinds: tuple[tuple[bool, Kind], ...] = (
        (info.isreg(), "file"), (info.isdir(), "folder"), (info.issym(), "symlink"), (info.islnk(), "hardlink"),
    )  # fmt: skip
    kind: Kind = next((name for is_kind, name in kinds if is_kind), "other")
    return Member(info.name, kind, info.size, info.mode, info.linkname, content)


def _zip_members(archive: Path, limits: Limits) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as pack:
        infos = pack.infolist()
        limits.check_members(len(infos))
        limits.check_bytes(sum(info.file_size for info in infos), "claims")
        for info in infos:
            if info.flag_bits & 1:
                raise ArchiveError(f"{info.filename!r} in the archive is encrypted", "unpack it by hand")
            yield _zip_member(pack, info)


def _zip_member(pack: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    def content() -> io.BufferedIOBase:
        return cast(io.BufferedIOBase, pack.open(info))

    mode = info.external_attr >> 16
    bare: Kind = "folder" if info.is_dir() else "file"
    kind = UNIX_KINDS.get(stat.S_IFMT(mode), "other") if stat.S_IFMT(mode) else bare
    link = ""
    if kind == "symlink":
        if info.file_size > LONGEST_LINK_BYTES:
            raise ArchiveError(f"{info.filename!r} in the archive is a link of {info.file_size} bytes", DISTRUST)
        with content() as stream:
            link = stream.read(LONGEST_LINK_BYTES).decode("utf-8", "surrogateescape")
    return Member(info.filename, kind, info.file_size, mode, link, content)
