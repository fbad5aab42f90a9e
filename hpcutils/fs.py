"""Files that appear whole or not at all: unique temporary in the same folder, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_MARK = ".part-"
LONGEST_STEM_BYTES = 140


def short_name(name: str) -> str:
    """Return `name`, or its beginning and a digest where it leaves no room for what hidden names put around it.

    A name has 255 bytes; a host's may have 64 of them.
    """
    if len(os.fsencode(name)) <= LONGEST_STEM_BYTES:
        return name
    import hashlib

    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f"{os.fsencode(name)[: LONGEST_STEM_BYTES - 20].decode(errors='ignore')}~{digest}"


def temporary_beside(target: Path, suffix: str = "") -> Path:
    """Return an unused name beside `target`, on the same file system, so that a rename is atomic.

    The host, the process and a random part are in the name: two nodes that share the folder cannot meet. `suffix` is for writers
    that choose a format by the end of the name.
    """
    unique = f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return target.with_name(f".{short_name(target.name)}{TEMPORARY_MARK}{unique}{suffix}")


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to its disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, target: Path) -> None:
    """Flush `temporary` and give it its name; whoever reads `target` sees the old file or the new one, never a part."""
    fsync_path(temporary)
    temporary.replace(target)
    fsync_path(target.parent)


def plain(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file that must be a plain one; `open(..., opener=plain)`. A pipe in its place would be waited for, without end.

    Raises:
        OSError: It is something else, or cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", os.fspath(path))
    return descriptor


@contextlib.contextmanager
def publishing(target: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path to fill; publish it on success, remove it on any failure.

    Example:
        with publishing(run / "model.keras", suffix=".keras") as temporary:
            model.save(temporary)
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target, suffix)
    try:
        yield temporary
        publish(temporary, target)
    except BaseException:
        remove(temporary)
        raise


def write_text(target: Path, text: str, mode: int = 0o644) -> None:
    """Write `text` (UTF-8) to `target` atomically."""
    with publishing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(mode)


def remove(path: Path) -> None:
    """Remove a file, link or folder; nothing there is not an error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def no_new_folders_on_failure(folder: Path) -> Iterator[None]:
    """Remove `folder`, and folders above it, that came into being inside a block that fails, where they are empty."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty: another process uses it
            for each in missing:
                each.rmdir()
        raise
