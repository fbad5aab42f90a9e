"""Put what came out of an archive beside the archive, among files that have nothing to do with it, and remember it.

A name that is free gets the whole subtree by one rename. Folders that are there are entered, never replaced. A file that is
there stays if it is the same, is replaced if it came out of this archive before, and is otherwise a reason to stop before
anything was moved.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcutils import fs
from hpcutils.errors import ArchiveError
from hpcutils.staging.turn import marker_path

IN_THE_WAY = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR})


@dataclass(frozen=True)
class Parcel:
    """An unpacked archive that is ready to be moved.

    Args:
        tree: The folder it was unpacked into.
        archive: The archive's place in the cache; its folder is where the content goes.
        tops: Names at the top of it.
        names: Files and links in it, relative.
        moves: Names, relative, each of which one rename puts in place.
    """

    tree: Path
    archive: Path
    tops: tuple[str, ...]
    names: tuple[str, ...]
    moves: tuple[str, ...]


@contextlib.contextmanager
def scratch(archive: Path) -> Iterator[Path]:
    """Yield an empty folder beside `archive`, on the same file system; it is gone afterwards."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    folder = fs.temporary_beside(archive)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        fs.remove(folder)


def plan_parcel(tree: Path, archive: Path, names: Iterable[str]) -> Parcel:
    """Decide what goes where; changes nothing.

    Raises:
        ArchiveError: Another file is in the way.
    """
    with os.scandir(tree) as entries:
        tops = sorted(entry.name for entry in entries)
    for top in tops:
        if top == archive.name or top.startswith(f".{fs.short_name(archive.name)}."):
            raise ArchiveError(f"{archive.name} holds a member of its own name, {top!r}", "store it as another fname")
    moves = _moves(tree, archive.parent, "", owned_names(archive))
    return Parcel(tree, archive, tuple(tops), tuple(names), tuple(moves))


def _moves(tree: Path, folder: Path, inside: str, owned: frozenset[str]) -> Iterator[str]:
    with os.scandir(tree / inside) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        name = f"{inside}/{entry.name}" if inside else entry.name
        ours, theirs = Path(entry.path), folder / name
        if not os.path.lexists(theirs):
            yield name
        elif _is_folder(ours) and _is_folder(theirs):
            yield from _moves(tree, folder, name, owned)
        elif _is_folder(ours) or _is_folder(theirs) or not (_is_same(ours, theirs) or name in owned):
            raise ArchiveError(
                f"{theirs} is there already, and is not what the archive holds under this name",
                "move it away, or give another cache_subdir; nothing was unpacked",
            )
        elif not _is_same(ours, theirs):
            yield name


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_same(ours: Path, theirs: Path) -> bool:
    """Say whether two links have the same words, or two files the same bytes."""
    if ours.is_symlink() or theirs.is_symlink():
        return ours.is_symlink() and theirs.is_symlink() and ours.readlink() == theirs.readlink()
    return theirs.is_file() and filecmp.cmp(ours, theirs, shallow=False)


def deliver(parcel: Parcel) -> None:
    """Move the parcel's content into place, and write down that it is there.

    Killed at any moment, it leaves whole files and no marker: the next call finds them the same and moves the rest.

    Raises:
        ArchiveError: Another call brought another file meanwhile.
        OSError: The disk refuses.
    """
    plan: Parcel | None = parcel
    while plan is not None:
        plan = _move(plan)
    fs.write_text(marker_path(parcel.archive), _marker(parcel))


def _move(parcel: Parcel) -> Parcel | None:
    """Rename; return what is left to do when another call was faster somewhere, which happens where locks do not work."""
    folder = parcel.archive.parent
    try:
        for name in parcel.moves:
            (parcel.tree / name).replace(folder / name)
    except OSError as exc:
        if exc.errno not in IN_THE_WAY:
            raise
        # It ends: each round finds at least one more name there, and enters it, leaves it or refuses.
        return plan_parcel(parcel.tree, parcel.archive, parcel.names)
    for place in sorted({(folder / name).parent for name in parcel.moves}):
        fs.fsync_path(place)
    return None


def _marker(parcel: Parcel) -> str:
    """Return the marker's text: a line that says which archive and which names at the top, then a line a member."""
    head = {"archive": _identity(parcel.archive), "top": parcel.tops}
    return "\n".join(json.dumps(item) for item in (head, *parcel.names)) + "\n"


def _identity(archive: Path) -> list[int]:
    state = archive.stat()
    return [state.st_size, state.st_mtime_ns]


def is_unpacked(archive: Path) -> bool:
    """Say whether this very archive was unpacked, and every name at its top is still there."""
    try:
        with marker_path(archive).open(encoding="utf-8") as stream:
            head = json.loads(stream.readline())
        same = bool(head["archive"] == _identity(archive))
        return same and all(os.path.lexists(archive.parent / top) for top in head["top"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def owned_names(archive: Path) -> frozenset[str]:
    """Return the names that came out of `archive`, or out of the file that had its name before."""
    try:
        with marker_path(archive).open(encoding="utf-8") as stream:
            next(stream, None)
            return frozenset(json.loads(line) for line in stream)
    except (FileNotFoundError, ValueError):
        return frozenset()
