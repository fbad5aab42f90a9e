"""Put a folder in the place of another one, at once where the file system can."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from pathlib import Path

# renameat2(2): the two names change their folders in one step (Linux 3.15; ext4, xfs, btrfs, tmpfs).
RENAME_EXCHANGE = 2
AT_FDCWD = -100
CANNOT = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP})


def swap(new: Path, old: Path, aside: Path) -> Path | None:
    """Give `new` the name of `old`; what was there is moved out of the way.

    Where names cannot be exchanged (NFS, an old C library), there is nothing at `old` for the moment between two renames.

    Args:
        new: A folder.
        old: A folder that is there, or was a moment ago.
        aside: An unused name on the same file system.

    Returns:
        Where the old folder is now; `None` when it went meanwhile.

    Raises:
        OSError: The disk refuses, or somebody else was faster.
    """
    with contextlib.suppress(FileNotFoundError):
        if _exchange(new, old):
            return new
        old.rename(aside)
        new.rename(old)
        return aside
    new.rename(old)
    return None


def _exchange(first: Path, second: Path) -> bool:
    """Let two names change places; says whether the system can."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    # What watches renames hears of this one too.
    sys.audit("os.rename", str(first), str(second), -1, -1)
    if call(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(second))
