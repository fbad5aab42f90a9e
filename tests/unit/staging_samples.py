"""Small datasets for the tests of staging, with segments of 64 KiB so that a few files make many."""

from __future__ import annotations

import os
from pathlib import Path

from hpcutils.staging.find import find_files
from hpcutils.staging.items import Outcome, Settings
from hpcutils.staging.leaders import Leaders
from hpcutils.staging.manifest import write_manifest
from hpcutils.staging.owner import is_alive, owner_in
from hpcutils.staging.stage import stage_manifest

SEGMENT = 1 << 16


def make_files(folder: Path) -> Path:
    """A large file, an empty one, and small ones in folders: 8 segments and a rest."""
    (folder / "small" / "deep").mkdir(parents=True)
    for number in range(12):
        (folder / "small" / f"{number:02}.bin").write_bytes(os.urandom(1 + 1997 * number))
    (folder / "small" / "deep" / "empty").write_bytes(b"")
    (folder / "large.h5").write_bytes(os.urandom(6 * SEGMENT - 1000))
    return folder


def make_set(folder: Path) -> tuple[Path, Path]:
    """Return a source folder and its manifest."""
    source = make_files(folder / "source")
    return source, write_manifest(find_files([source]), folder / "set.jsonl", SEGMENT).path


def tree_of(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stage_set(manifest: Path, source: Path | str, root: Path, **settings: object) -> Outcome:
    return stage_manifest(manifest, str(source), Settings(root, **settings), Leaders())  # type: ignore[arg-type]


def left_in(root: Path) -> list[str]:
    """Return what killed runs left in a cache: partials, trash, temporaries, and their pins beside the last run's own."""
    pins: dict[str, list[Path]] = {}
    for pin in sorted(root.glob("pins/*"), key=lambda path: path.stat().st_mtime_ns):
        # kind.key.owner
        pins.setdefault(pin.name.rpartition(pin.name.split(".", 2)[2])[0], []).append(pin)
    old = [pin for those in pins.values() for pin in those[:-1] if not _is_in_use(pin)]
    return sorted(str(path.relative_to(root)) for path in [*root.rglob(".*"), *old])


def _is_in_use(pin: Path) -> bool:
    owner = owner_in(pin.name.split(".", 2)[2])
    return owner is not None and is_alive(owner, pin.stat().st_mtime)
