"""A copy of the user's code beside the run, so that editing the sources never changes a job that waits in the queue."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from hpcutils.errors import RequestError
from hpcutils.hashing import digest_file
from hpcutils.specs.code import is_code, is_code_folder

LARGEST_TOTAL_BYTES = 64 << 20


def code_files(folder: Path) -> list[Path]:
    """Return the files of a job folder that count as code, sorted: text formats up to 1 MiB, no hidden and no cache folders.

    Raises:
        RequestError: They are more than 64 MiB: this is no job's folder.
    """
    found, total = [], 0
    for parent, folders, names in os.walk(folder):
        # In place: os.walk then leaves them out.
        folders[:] = sorted(filter(is_code_folder, folders))
        for path in filter(is_code, (Path(parent, name) for name in sorted(names))):
            found.append(path)
            total += path.stat().st_size
            if total > LARGEST_TOTAL_BYTES:
                raise RequestError(
                    f"{folder} holds more than {LARGEST_TOTAL_BYTES >> 20} MiB of code files, which are copied with every run",
                    "keep train.yaml and its modules in a folder of their own",
                )
    return sorted(found)


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
