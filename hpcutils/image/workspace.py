"""A temporary folder for one build that is gone afterwards, however the build ended."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from hpcutils.errors import ImageError
from hpcutils.fs import TEMPORARY_MARK, remove
from hpcutils.image.plan import SHORT, BuildPlan
from hpcutils.log import LOGGER
from hpcutils.shell import run

PREFIX = "hpcutils-build-"
# A build unpacks the base twice and the environment once, and packs the result.
NEEDED_BYTES = 6 << 30


@contextlib.contextmanager
def workspace(root: Path) -> Iterator[Path]:
    """Yield an empty folder of this build; remove it afterwards, and those of builds that were killed.

    Args:
        root: Folder that it is made in: local, and roomy.

    Raises:
        ImageError: There is too little space.
    """
    for folder in root.glob(f"{PREFIX}{os.getuid()}-*"):
        _remove_if_abandoned(folder)
    free_bytes = shutil.disk_usage(root).free
    if free_bytes < NEEDED_BYTES:
        raise ImageError(
            f"{root}: {free_bytes / 2**30:.1f} GiB free, a build needs {NEEDED_BYTES / 2**30:.0f}",
            "set TMPDIR to a folder on a roomier local disk",
        )
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getuid()}-", dir=root))
    # The root user of a namespace has another number out here, and must be able to pass.
    folder.chmod(0o711)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            remove_tree(folder)


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Turn SIGTERM, and the end of the terminal, into an exception meanwhile: a build that is told to end cleans up first."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    # What is ignored (nohup) stays ignored.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in (number for number, handler in before.items() if handler is not signal.SIG_IGN):
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def one_at_a_time(lock: Path, waiting: str) -> Iterator[None]:
    """Hold a lock file of this machine; say `waiting` when somebody else holds it.

    The lock saves work, no more: on network file systems it may not hold, and files are published by rename anyway.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            LOGGER.info(waiting)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def sweep(plan: BuildPlan) -> None:
    """Remove what builds of this recipe left that were killed outright: parts of half a gigabyte each. Call it with the lock held.

    Only what was written on this host, by a process that is gone; bases and wheels are of every recipe.
    """
    name = re.escape(plan.files.recipe.name)
    own = rf"{name}(?:-[0-9a-f]{{{SHORT}}})?(?:\.sif|\.oci\.tar|\.json|\.cdx\.json|\.oci\.json|\.oci\.cdx\.json)"
    folders = {
        plan.image.parent: own,
        plan.environment.parent: own,
        plan.environment.parents[1] / "bases": ".+",
        plan.wheels.parent: ".+",
    }
    for folder, pattern in folders.items():
        for path in folder.glob(f".*{TEMPORARY_MARK}{glob.escape(os.uname().nodename)}-*"):
            found = re.fullmatch(rf"\.{pattern}{TEMPORARY_MARK}.+-(\d+)-[0-9a-f]{{8}}(?:\.\w+)*", path.name)
            if found is not None and not Path(f"/proc/{found[1]}").exists():
                remove(path)
                LOGGER.info(f"removed {path}, which a build that was killed has left")


def remove_tree(folder: Path) -> None:
    """Remove a folder in which some files belong to other users of our own user namespace."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        run(["unshare", "--map-root-user", "--map-auto", "rm", "-rf", "--", str(folder)], check=False)
    if folder.exists():
        LOGGER.warning(f"could not remove all of {folder}")


def _remove_if_abandoned(folder: Path) -> None:
    """Remove a build's folder unless its owner still holds the lock in it."""
    try:
        with (folder / "lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except OSError:
        # Between mkdtemp and the lock, or already going: leave it to its owner.
        return
    remove_tree(folder)
