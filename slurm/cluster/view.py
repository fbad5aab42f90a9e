"""What a mount namespace shows: private folders on top of the machine's, and the checkout always in sight.

Everything here runs in a mount namespace of its own and ends with it: the machine's mounts are never touched.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from . import kernel
from .errors import SandboxError


def make_private() -> None:
    """Cut the namespace off: on a machine with systemd, mounts would otherwise show up outside."""
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)


def cover_with_tmpfs(target: Path, mode: int, keep: Sequence[Path]) -> None:
    """Hide a folder behind an empty one in memory, except the folders to keep."""
    options = f"mode={mode:o}"
    cover(target, lambda: kernel.mount("tmpfs", str(target), "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options), keep)


def cover(target: Path, mount_over: Callable[[], None], keep: Sequence[Path]) -> None:
    """Mount something over a folder, then show again, each at its own path, what must stay visible below it.

    Args:
        target: The folder to hide.
        mount_over: Does the mount.
        keep: Folders that must not vanish. Those elsewhere need nothing. Where one is the target itself, nothing
            is covered: it has to stay.
    """
    inside = [path for path in keep if path.is_relative_to(target)]
    if target in inside:
        return
    handles = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in inside}
    mount_over()
    for path, handle in handles.items():
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        kernel.bind(f"/proc/self/fd/{handle}", str(path))
        os.close(handle)


def reveal(keep: Sequence[Path], uid: int) -> None:
    """Make folders reachable for a user, by covering the topmost folder on the way that would stop them."""
    for path in keep:
        while (blocked := first_blocked(path, uid)) is not None:
            if blocked == path:
                raise SandboxError(f"user {uid} may not enter the folder", str(path), f"chmod -R o+rX {path}")
            cover_with_tmpfs(blocked, 0o755, keep)


def first_blocked(path: Path, uid: int) -> Path | None:
    """The topmost folder from the root down to `path` that the user cannot traverse, or None."""
    for folder in [*reversed(path.parents), path]:
        status = folder.stat()
        owned = status.st_uid == uid
        if not status.st_mode & (stat.S_IXUSR if owned else stat.S_IXOTH):
            return folder
    return None
