"""What a manifest lists: files, and the files in folders, in order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcutils.errors import DataError
from hpcutils.staging.archive import DEEPEST_FOLDER


@dataclass(frozen=True)
class Found:
    """A file that is to be listed: its name in the manifest, and where it is."""

    name: str
    path: Path


def common_folder(places: Sequence[Path]) -> Path:
    """Return the folder that the paths in a manifest of `places` start from: a single folder itself, else what all are in."""
    if len(places) == 1 and places[0].is_dir():
        return places[0].resolve()
    return Path(os.path.commonpath([str(_placed(place).parent) for place in places]))


def _placed(place: Path) -> Path:
    """Return where a place is without links on the way. A link to a file keeps its own name: it counts as the file."""
    return place.resolve() if place.is_dir() else place.parent.resolve() / place.name


def find_files(places: Sequence[Path]) -> Iterator[Found]:
    """Yield what a manifest of `places` lists: files, and the files in folders, sorted, by their paths below `common_folder`.

    Links to files count as the files. Empty folders are not kept.

    Raises:
        DataError: A place is missing, or is neither a file nor a folder; a link leads to a folder.
    """
    folder = common_folder(places)
    for place in places:
        inside = os.path.relpath(_placed(place), folder)
        if place.is_dir():
            yield from _walk(place, "" if inside == "." else f"{inside}/")
        elif place.is_file():
            yield Found(inside, place)
        else:
            raise DataError(f"no file and no folder: {place}")


def _walk(folder: Path, inside: str) -> Iterator[Found]:
    # Of a million files in one folder only the names are kept, and what is not simply a file.
    names: list[str] = []
    others: dict[str, os.DirEntry[str]] = {}
    try:
        with os.scandir(folder) as found:
            for entry in found:
                names.append(entry.name)
                if not entry.is_file(follow_symlinks=False):
                    others[entry.name] = entry
    except OSError as exc:
        raise DataError(f"cannot read {folder}: {exc.strerror}") from exc
    for name in sorted(names):
        if name in others:
            yield from _other(others[name], f"{inside}{name}")
        else:
            yield Found(f"{inside}{name}", folder / name)


def _other(entry: os.DirEntry[str], name: str) -> Iterator[Found]:
    """Yield what a folder or a link stands for."""
    if entry.is_dir(follow_symlinks=False):
        if name.count("/") >= DEEPEST_FOLDER:
            raise DataError(f"{entry.path} lies below more than {DEEPEST_FOLDER} folders", "pack it into an archive")
        yield from _walk(Path(entry.path), f"{name}/")
    elif entry.is_file():
        yield Found(name, Path(entry.path))
    else:
        kind = "a link to a folder, or to nothing" if entry.is_symlink() else "neither a file nor a folder"
        raise DataError(f"{entry.path} is {kind}", "leave it out, or name what it leads to as a further argument")
