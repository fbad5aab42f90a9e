"""The cache's folder belongs to one user, and nobody else may change it or put another in its place."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hpcutils.errors import DataError

BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
# Whose files root's are in the user namespace of a container.
OVERFLOW_UID = 65534


def open_root(root: Path) -> None:
    """Make the cache's folder, private to the user.

    Raises:
        DataError: It cannot be made, or belongs to somebody else, who could change what is in it.
    """
    try:
        for folder in (root.parent, root):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = root.stat()
    except OSError as exc:
        raise DataError(
            f"cannot make the cache {root}: {exc.strerror}", "set HPCUTILS_NODE_CACHE to a folder on a local disk"
        ) from exc
    if facts.st_uid != os.geteuid() or facts.st_mode & BY_OTHERS or _is_swappable(root.parent):
        raise DataError(
            f"the cache {root} can be changed by others",
            f"chmod go-w it and {root.parent}, or set HPCUTILS_NODE_CACHE to a folder of your own",
        )


def _is_swappable(parent: Path) -> bool:
    """Say whether somebody else could put another folder in the place of one in `parent`.

    In /tmp, where each may remove what is theirs alone, nobody can; but who makes `hpcutils-alice` there before alice does can.
    """
    facts = parent.stat()
    if parent.name.startswith("hpcutils-"):
        owners = {os.geteuid()} if _of_parent(parent).st_uid == os.geteuid() else set()
        return facts.st_uid not in owners or bool(facts.st_mode & BY_OTHERS)
    trusted = facts.st_uid in (os.geteuid(), 0, OVERFLOW_UID)
    return not trusted or bool(facts.st_mode & BY_OTHERS and not facts.st_mode & stat.S_ISVTX)


def _of_parent(parent: Path) -> os.stat_result:
    return parent.lstat()
