"""Unpack an archive that nobody vouches for.

Python's own checks are not relied on: those of 3.11 are absent, or older than the attacks. Each member is judged here and
written by this module, with `O_EXCL` and `O_NOFOLLOW`, into an empty folder that nobody else knows. Symlinks are made
last, so that nothing can be written through one. What is refused is refused as a whole: the caller throws the folder away.

Rights are those of the umask (executable files stay executable) and times are now: owners, times and special bits of the
machine that packed the archive mean nothing on this one.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from hpcutils.errors import ArchiveError
from hpcutils.staging.members import COPY_BYTES, DISTRUST, Limits, Member, damage_named, members_of

# Deeper than any dataset, and shallow enough for a recursive removal.
DEEPEST_FOLDER = 100
Parts = tuple[str, ...]


def unpack(archive: Path, folder: Path, formats: Sequence[str], limits: Limits, label: str | None = None) -> list[str]:
    """Unpack `archive` into `folder`, and flush it to its disk.

    Args:
        archive: The file.
        folder: Empty, and private to the caller; after a failure its content is to be thrown away.
        formats: What to try, in order: `tar`, `zip`.
        limits: What the archive may become.
        label: What to call it in messages; `None` is its file name.

    Returns:
        The names of the files and links that were made, relative to `folder`.

    Raises:
        ArchiveError: It is none of `formats`, is damaged, or holds a member that is refused.
        OSError: The disk refuses.
    """
    tree = Tree(folder, limits)
    label = label or archive.name
    with damage_named(label):
        for member in members_of(archive, formats, limits, label):
            tree.add(member)
    tree.make_links()
    flush(folder)
    return list(tree.names)


def parts_of(name: str) -> Parts:
    """Return the steps of a member's name, below the folder it is unpacked into; none is the folder itself.

    A backslash counts as a separator when looking for `..`: such names come from other systems.

    Raises:
        ArchiveError: The name leaves the folder, or is none.
    """
    if not name or "\0" in name:
        raise _refused(name, "has no usable name")
    seen = name.replace("\\", "/")
    if seen.startswith("/") or (seen[1:2] == ":" and seen[:1].isalpha()):
        raise _refused(name, "has an absolute name")
    if ".." in seen.split("/"):
        raise _refused(name, "has '..' in its name")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if len(parts) > DEEPEST_FOLDER:
        raise _refused(name, f"lies deeper than {DEEPEST_FOLDER} folders")
    return parts


def check_symlink(parts: Parts, link: str) -> None:
    """Refuse a symlink whose own words lead out; where it really ends is looked at when all is there.

    Raises:
        ArchiveError: It is absolute, or climbs above the folder.
    """
    depth = len(parts) - 1
    for step in link.split("/"):
        depth += {"..": -1, "": 0, ".": 0}.get(step, 1)
        if depth < 0:
            break
    if not link or "\0" in link or link.startswith("/") or depth < 0:
        raise _refused("/".join(parts), f"is a link to {link!r}, outside the archive")


def check_mode(member: Member) -> None:
    """Refuse bits that let a file run as somebody else. On a folder set-group-id is usual, harmless, and dropped.

    Raises:
        ArchiveError: set-uid, or set-gid on a file.
    """
    forbidden = stat.S_ISUID if member.kind == "folder" else stat.S_ISUID | stat.S_ISGID
    if member.mode & forbidden:
        raise _refused(member.name, "is set-uid or set-gid")


def _refused(name: str, why: str) -> ArchiveError:
    return ArchiveError(f"refused: {name!r} in the archive {why}; nothing was unpacked", DISTRUST)


class Tree:
    """The folder that is being filled. Every name below it was made here; until `make_links` none is a symlink."""

    def __init__(self, root: Path, limits: Limits) -> None:
        self.root, self.limits = root, limits
        # A member that comes twice is one file: the later one.
        self._names: dict[str, None] = {}
        self._folders: set[Parts] = {()}
        self._symlinks: dict[Parts, str] = {}
        self._buffer = memoryview(bytearray(COPY_BYTES))
        self._members = self._claimed_bytes = self._written_bytes = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The files and links that were made."""
        return tuple(self._names)

    def add(self, member: Member) -> None:
        """Judge one member and write it.

        Raises:
            ArchiveError: It is refused.
        """
        self._members += 1
        self.limits.check_members(self._members)
        check_mode(member)
        parts = parts_of(member.name)
        self._refuse_way_through_link(parts)
        if member.kind == "folder":
            self._folder(parts)
        elif member.kind == "other":
            raise _refused(member.name, "is a device, a pipe or something unknown")
        elif not parts:
            raise _refused(member.name, "has no usable name")
        else:
            {"file": self._file, "symlink": self._symlink, "hardlink": self._hardlink}[member.kind](parts, member)
            self._names["/".join(parts)] = None

    def _refuse_way_through_link(self, parts: Parts) -> None:
        for end in range(1, len(parts) + 1) if self._symlinks else ():
            if parts[:end] in self._symlinks:
                raise _refused("/".join(parts), f"passes through the link {'/'.join(parts[:end])!r}")

    def _folder(self, parts: Parts) -> Path:
        """Return a folder of the tree, made if need be."""
        path = self.root.joinpath(*parts)
        if parts not in self._folders:
            self._folder(parts[:-1])
            try:
                path.mkdir()
            except FileExistsError as exc:
                raise _refused("/".join(parts), "is a folder and something else at once") from exc
            self._folders.add(parts)
        return path

    def _file(self, parts: Parts, member: Member) -> None:
        self._claimed_bytes += member.size_bytes
        if member.size_bytes < 0:
            raise _refused(member.name, "has a negative size")
        self.limits.check_bytes(self._claimed_bytes, "claims")
        path = self._folder(parts[:-1]) / parts[-1]
        with member.open() as content, self._create(path, parts, member.mode) as out:
            written_bytes = 0
            while count := content.readinto(self._buffer):
                written_bytes += count
                self.limits.check_bytes(self._written_bytes + written_bytes, "unpacks to")
                out.write(self._buffer[:count])
        self._written_bytes += written_bytes
        if written_bytes != member.size_bytes:
            raise _refused(member.name, f"claims {member.size_bytes} bytes and holds {written_bytes}")

    def _create(self, path: Path, parts: Parts, mode: int) -> BinaryIO:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        rights = 0o777 if mode & stat.S_IXUSR else 0o666
        try:
            return open(os.open(path, flags, rights), "wb")
        except FileExistsError:
            self._make_room(path, parts)
            return open(os.open(path, flags, rights), "wb")

    def _make_room(self, path: Path, parts: Parts) -> None:
        """Let the later of two files of one name win, as tar does."""
        if parts in self._folders:
            raise _refused("/".join(parts), "is a folder and something else at once")
        path.unlink(missing_ok=True)

    def _symlink(self, parts: Parts, member: Member) -> None:
        check_symlink(parts, member.link)
        self._symlinks[parts] = member.link

    def _hardlink(self, parts: Parts, member: Member) -> None:
        aim = parts_of(member.link)
        source = self.root.joinpath(*aim)
        if aim == parts or not source.is_file():
            raise _refused(member.name, f"is a hard link to {member.link!r}, which is no file before it in the archive")
        path = self._folder(parts[:-1]) / parts[-1]
        self._make_room(path, parts)
        os.link(source, path, follow_symlinks=False)

    def make_links(self) -> None:
        """Make the symlinks, and see that each ends at something of the archive.

        Raises:
            ArchiveError: One leads out, in a circle, or to nothing: to what may be there one day, that is.
        """
        for parts, link in self._symlinks.items():
            self._refuse_way_through_link(parts[:-1])
            path = self._folder(parts[:-1]) / parts[-1]
            try:
                path.symlink_to(link)
            except FileExistsError as exc:
                raise _refused("/".join(parts), "is a link and something else at once") from exc
        root = os.path.realpath(self.root)
        for parts, link in self._symlinks.items():
            self._check_end(root, parts, link)

    def _check_end(self, root: str, parts: Parts, link: str) -> None:
        try:
            end = os.path.realpath(self.root.joinpath(*parts), strict=True)
        except OSError as exc:
            raise _refused("/".join(parts), f"is a link to {link!r}, which is not in the archive") from exc
        if os.path.commonpath([root, end]) != root:
            raise _refused("/".join(parts), f"is a link that ends outside the archive, by way of {link!r}")


def flush(folder: Path) -> None:
    """Flush the file system that holds `folder`: one call, where a million files would need a million."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(descriptor)
