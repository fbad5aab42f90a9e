"""A copy of the user's code beside the run, so that editing the sources never changes a job that waits in the queue."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from hpcutils.errors import RequestError
from hpcutils.hashing import digest_file

LARGEST_FILE_BYTES = 1 << 20
LARGEST_TOTAL_BYTES = 64 << 20
SKIPPED = {"__pycache__", "runs", "node_modules"}
SUFFIXES = {".py", ".yaml", ".yml", ".toml", ".json", ".txt", ".md", ".cfg", ".ini", ".csv"}


def code_files(folder: Path) -> list[Path]:
    """Return the files of a job folder that count as code, sorted: text formats up to 1 MiB, no hidden and no cache folders."""
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in SUFFIXES and path.is_file() and path.stat().st_size <= LARGEST_FILE_BYTES and _counts(path, folder)
    ]
    total = sum(path.stat().st_size for path in found)
    if total > LARGEST_TOTAL_BYTES:
        raise RequestError(
            f"{folder} holds {total >> 20} MiB of code files; up to {LARGEST_TOTAL_BYTES >> 20} MiB are copied with a run",
            "keep train.yaml and its modules in a folder of their own",
        )
    return found


def _counts(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return not any(part in SKIPPED or part.startswith(".") for part in parts)


def snapshot(folder: Path, target: Path) -> str:
    """Copy the code of `folder` into `target` and return its digest (sha256 over names and contents)."""
    state = hashlib.sha256()
    target.mkdir(parents=True, exist_ok=True)
    for path in code_files(folder):
        name = path.relative_to(folder)
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        # Of the copy: what will run is what is recorded.
        state.update(f"{name.as_posix()}\0{digest_file(copy)}\n".encode())
    return state.hexdigest()
