"""One call at a time for one file, where a lock can be had; and the traces of killed calls, swept.

Nothing is right or wrong because of the lock: files appear by rename alone. It saves the second download. On file systems
where locks are refused or are granted to everybody (some NFS, Lustre) two calls both download, and both are right.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from hpcutils import fs
from hpcutils.log import LOGGER

STALE_AFTER_S = 24 * 3600
# What `fs.temporary_beside` puts behind the mark: host (which may hold dashes), process, random part.
OWNER = re.compile(re.escape(fs.TEMPORARY_MARK) + r"(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}$")
# include/linux/sched.h: set before a dying process closes its files, and kept until its parent has waited for it.
PF_EXITING = 0x4
# A file system without locks says one of these; EBADF is NFS, which locks only what is open for writing.
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EINVAL})


def marker_path(target: Path) -> Path:
    """Return the file that says that `target` was unpacked, and what came out of it."""
    return target.with_name(f".{fs.short_name(target.name)}.extracted")


def lock_path(target: Path) -> Path:
    """Return the file that is there while a call works on `target`, or since one was killed."""
    return target.with_name(f".{fs.short_name(target.name)}.lock")


@contextlib.contextmanager
def turn(target: Path) -> Iterator[None]:
    """Wait until no other call works on `target`; clear what killed calls left of it.

    Raises:
        OSError: The folder cannot be written.
    """
    descriptor = _take(lock_path(target), target)
    try:
        sweep(target)
        yield
    finally:
        _release(descriptor, lock_path(target))


def tidy(target: Path) -> None:
    """Clear what a killed call left of `target`, unless another call works on it or the folder is read-only."""
    lock = lock_path(target)
    if not lock.exists():
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return
        try:
            sweep(target)
        finally:
            _release(descriptor, lock)


def _take(lock: Path, target: Path) -> int:
    """Return the descriptor of the lock file, locked where that is possible."""
    while True:
        # Again each time: a call that failed takes the empty folder that it made with it.
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(lock, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue
        try:
            _flock(descriptor, target)
            # Whoever had it before has removed the file meanwhile: a lock on a file without a name keeps nobody out.
            if _is_at(descriptor, lock):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        LOGGER.info("%s: waiting for another process that is fetching it", target)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as exc:
        if exc.errno not in NO_LOCKS:
            raise


def _is_at(descriptor: int, lock: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    return False


def _release(descriptor: int, lock: Path) -> None:
    # The name goes first: who waits on this file finds it gone and makes a new one.
    try:
        if _is_at(descriptor, lock):
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def sweep(target: Path) -> None:
    """Remove temporaries of `target` whose process on this host is dead, or that nobody touched for a day."""
    prefixes = tuple(f".{fs.short_name(path.name)}{fs.TEMPORARY_MARK}" for path in (target, marker_path(target)))
    with os.scandir(target.parent) as entries:
        stale = [Path(entry.path) for entry in entries if entry.name.startswith(prefixes) and _is_stale(entry)]
    for path in stale:
        LOGGER.info("%s: left by a call that was killed, removed", path)
        fs.remove(path)


def _is_stale(entry: os.DirEntry[str]) -> bool:
    owner = OWNER.search(entry.name)
    if owner is not None and owner["host"] == os.uname().nodename and not _is_alive(int(owner["pid"])):
        return True
    with contextlib.suppress(FileNotFoundError):
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_AFTER_S
    return False


def _is_alive(pid: int) -> bool:
    """Say whether a process runs.

    One that is dying, or is dead and not waited for, does not: it gave its locks back, and will write no more.
    """
    try:
        os.kill(pid, 0)
        # proc(5): behind the name, which may hold anything, the kernel's flags are the seventh word.
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return not int(words[6]) & PF_EXITING
