"""A disk on which a step can be made to fail, or to be the last that a process does.

Python tells of what it is about to do (audit events); the steps that need room or rights on the disk are counted. `os.pwrite` and
`os.fsync` have no events and are counted by hand.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from staging_samples import stage_set, tree_of

from hpcutils import fs
from hpcutils.errors import DataError
from hpcutils.staging import store

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
STEPS = {"os.mkdir", "os.rename", "os.truncate", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"}


def refuse(number: int) -> Callable[[], None]:
    """Return what a step does that the operating system refuses."""

    def step() -> None:
        raise OSError(number, os.strerror(number))

    return step


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


class Disk:
    """Counts the steps below a folder, and lets something happen at one of them."""

    def __init__(self) -> None:
        self.folder, self.count, self.at = "", 0, 0
        self.happens: Callable[[], None] = die
        self.removals = False
        self.lock = threading.Lock()

    def step(self) -> None:
        with self.lock:
            self.count += 1
            now = self.count == self.at
        if now:
            self.happens()

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.folder:
            return
        words = [os.fsdecode(word) for word in arguments if isinstance(word, (str, bytes, os.PathLike))]
        if not any(word.startswith(self.folder) for word in words):
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        removes = event in ("os.remove", "os.rmdir", "shutil.rmtree")
        if writes or (event in STEPS and (self.removals or not removes)):
            self.step()


DISK = Disk()
# It cannot be taken away again, and costs next to nothing while no folder is watched.
sys.addaudithook(DISK.hook)


@contextmanager
def watched(folder: Path, at: int, happens: Callable[[], None], *, removals: bool = False) -> Iterator[Disk]:
    """Watch `folder`: at step `at` (0: none) something `happens`. Removals count only for `removals`: a full disk allows them."""

    def counted(call: Callable) -> Callable:
        def step(*arguments):
            DISK.step()
            return call(*arguments)

        return step

    DISK.count, DISK.at, DISK.happens, DISK.removals = 0, at, happens, removals
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", counted(os.pwrite))
        # Counted, and left out: nobody pulls the plug here, and thousands of them take their time.
        patch.setattr(os, "fsync", counted(lambda descriptor: None))
        DISK.folder = str(folder)
        try:
            yield DISK
        finally:
            DISK.folder = ""


def full_under(patch: pytest.MonkeyPatch, what: str) -> None:
    """Let every write(2) to a partial's `segments`, marker or list fail with ENOSPC: a link to `/dev/full` is in its place."""
    if what == store.SEGMENTS:
        begin = store.write_finished

        def begun(folder: Path, *words: object) -> None:
            begin(folder, *words)  # type: ignore[arg-type]
            (folder / what).unlink()
            (folder / what).symlink_to("/dev/full")

        patch.setattr(store, "write_finished", begun)
        return
    beside, copy = fs.temporary_beside, shutil.copyfile

    def temporary(target: Path, suffix: str = "") -> Path:
        path = beside(target, suffix)
        if target.name == what and target.parent.name.startswith("."):
            path.symlink_to("/dev/full")
        return path

    def copied(source: Path, target: Path) -> None:
        if target.name == what:
            target.symlink_to("/dev/full")
        copy(source, target)

    patch.setattr(fs, "temporary_beside", temporary)
    patch.setattr(shutil, "copyfile", copied)


def begin_nothing(source: Path, manifest: Path, root: Path) -> None:
    pass


def begin_partial(source: Path, manifest: Path, root: Path) -> None:
    """Leave a partial of most segments."""
    last = source / "small" / "11.bin"
    body = last.read_bytes()
    last.unlink()
    with pytest.raises(DataError):
        stage_set(manifest, source, root)
    last.write_bytes(body)


def begin_corrupt(source: Path, manifest: Path, root: Path) -> None:
    """Leave a complete dataset with a file that was written to."""
    begin_pinned(source, manifest, root)
    for pin in (root / "pins").iterdir():
        pin.unlink()


def begin_pinned(source: Path, manifest: Path, root: Path) -> None:
    """Leave such a dataset with the pin of this process: for a child of it that of a job that runs."""
    (stage_set(manifest, source, root).files / "small" / "05.bin").write_bytes(b"changed")


BEGINNINGS = {"nothing there": begin_nothing, "a partial": begin_partial, "a changed dataset": begin_corrupt}
PINNED = {"a changed dataset that a job uses": begin_pinned}


def published(root: Path) -> list[dict[str, bytes]]:
    """Return the files of everything that has a published name and a marker."""
    return [
        tree_of(marker.parent / "files") for marker in root.glob("*/*/complete.jsonl") if not marker.parent.name.startswith(".")
    ]
