"""Opening an HDF5 dataset for reading: one handle a process, opened again when the file was replaced, and no traps.

A file can point elsewhere: external links, external storage and virtual datasets make HDF5 open any other file of the host
that the user may read. They are refused unless the caller asked for them, before HDF5 follows them.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import h5py
from h5py._objects import phil

from hpcutils.data.arriving import NO_DEVICE, ByteSource, SourceFile, source_identity
from hpcutils.data.readers import Reader, Token, choose_reader
from hpcutils.errors import DataError

# Device, inode, bytes, times of change of the data and of the inode (ns): differs when the file at a path was replaced or
# written. Tools that copy times can restore the former, not the latter; a new link or other rights change it, too, and cost
# one opening.
Identity: TypeAlias = tuple[int, int, int, int, int]

# What h5py does when it is not told, none, HDF5's strict locks, and those that pass over file systems without any.
LOCKINGS: tuple[bool | str | None, ...] = (None, False, True, "best-effort")

MAX_SOFT_LINKS = 32
MAX_VIRTUAL_DEPTH = 8


@dataclass(eq=False)
class OpenDataset:
    """A dataset of an open file, as one process sees it; `is_shut` once `shut` closed it, maybe under a thread that reads."""

    file: h5py.File
    reader: Reader
    identity: Identity
    token: Token
    process: object
    is_shut: bool = False

    def is_ours(self) -> bool:
        """Tell whether this process opened it, and not one that it was forked from."""
        return self.process is OPENED.process

    def is_current(self, path: str) -> bool:
        """Tell whether this process opened it and the file at `path` is still the same: 2 us, most of it for `stat`.

        One that arrives is current as long as there is none at `path`.
        """
        if self.is_shut or self.process is not OPENED.process:
            return False
        try:
            status = os.stat(path)  # noqa: PTH116 - asked for each request
        except OSError:
            return self.is_arriving  # opening says why
        return self.identity == _identity(status)

    @property
    def is_arriving(self) -> bool:
        """Whether its bytes come from a `ByteSource`."""
        return self.identity[0] == NO_DEVICE

    def shut(self) -> None:
        """Close the file. The flag comes first: a read that fails because of this finds it set."""
        self.is_shut = True
        self.file.close()


class _Opened:
    """The handles of this process, and of the process that it was forked from; `lock` is held while one is opened."""

    def __init__(self) -> None:
        self.handles: weakref.WeakSet[OpenDataset] = weakref.WeakSet()
        self.renew()

    def renew(self) -> None:
        self.lock = threading.RLock()
        self.process = object()  # another one in a forked child: cheaper to compare than process numbers

    def close_stale(self, identity: Identity) -> None:
        """Close what was inherited from a parent process, or belongs to an older state of the same file.

        HDF5 keeps one structure for each file a process has open. Without this, opening the file again would be given
        the old structure: with the parent's descriptor, or with the old contents.
        """
        for handle in list(self.handles):
            rewritten = handle.identity[:2] == identity[:2] and handle.identity != identity
            if not handle.is_ours() or rewritten:
                handle.shut()
                self.handles.discard(handle)

    def close_arriving(self) -> None:
        """Close files that are read through Python: HDF5 would do it after the end of the interpreter, and crash."""
        for handle in list(self.handles):
            if handle.is_arriving and handle.is_ours():
                handle.shut()


OPENED = _Opened()
os.register_at_fork(after_in_child=OPENED.renew)
atexit.register(OPENED.close_arriving)


def identity_of(path: str) -> Identity:
    """Return what changes when the file at `path` is replaced or written.

    Raises:
        DataError: There is no such file, or it may not be looked at.
    """
    try:
        return _identity(os.stat(path))  # noqa: PTH116 - as above
    except OSError as exc:
        raise DataError(f"{path}: {exc.strerror}", "check the path, and that the data was staged to this node") from exc


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def open_dataset(path: str, name: str, allow_external: bool, source: ByteSource | None = None) -> OpenDataset:
    """Open dataset `name` of the file at `path`, read-only, and keep no lock on it (see `_open_file`).

    Args:
        path: The file.
        name: The dataset.
        allow_external: Whether it may read other files.
        source: Its bytes, as long as it is not there.

    Raises:
        DataError: No such file or dataset, not HDF5, no rows, or data in other files without `allow_external`.
    """
    with OPENED.lock:
        if source is not None and Path(path).exists():
            source = None
        identity = identity_of(path) if source is None else source_identity(source)
        OPENED.close_stale(identity)
        file = _open_file(path, source)
        try:
            dataset = _find(file, name, allow_external)
            if not allow_external:
                _refuse_other_files(dataset, 0)
            if not dataset.shape:
                raise DataError(f"{path}: dataset {name!r} has no rows: its shape is {dataset.shape}", _listing(file))
            token = (*identity, dataset.name)
            handle = OpenDataset(file, choose_reader(file, dataset, token, source), identity, token, OPENED.process)
        except BaseException:
            file.close()
            raise
        OPENED.handles.add(handle)
        return handle


def _open_file(path: str, source: ByteSource | None) -> h5py.File:
    """Open the file beside whatever has it open in this process, and keep no lock.

    HDF5 keeps one structure for a file that a process opens twice, and refuses the second handle unless it asks for the
    same kind of locks. So the file is opened as h5py does by default, which every other plain `h5py.File` then fits, and
    in the other ways where that is refused: by a handle that is already there, by a writer's lock, or by a file system
    without locks. The lock itself is given back at once: a job may read for days, and need not keep writers out. A file
    that arrives is nobody else's, and has nothing to lock.
    """
    refusal: OSError | None = None
    for locking in LOCKINGS if source is None else (False,):
        try:
            file = h5py.File(path if source is None else SourceFile(source, path), "r", locking=locking)
        except OSError as exc:
            refusal = refusal or exc
            continue
        _unlock(file)
        return file
    reason = "is a folder" if Path(path).is_dir() else str(refusal)
    raise DataError(f"{path}: not a readable HDF5 file: {reason}", "an .h5 or .hdf5 file was expected") from refusal


def _unlock(file: h5py.File) -> None:
    """Give back the lock that opening took; one that another handle of this process holds stays."""
    if file.driver != "sec2":
        return
    descriptor = file.id.get_vfd_handle()
    with phil:
        # By number: handles of one file are "equal".
        handles = h5py.h5f.get_obj_ids(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE)
        others = [other for other in handles if other.id != file.id.id]
        if all(not _is_sec2(other) or other.get_vfd_handle() != descriptor for other in others):
            with contextlib.suppress(OSError):  # there is none where the file system has none
                fcntl.flock(descriptor, fcntl.LOCK_UN)


def _is_sec2(file: h5py.h5f.FileID) -> bool:
    return bool(file.get_access_plist().get_driver() == h5py.h5fd.SEC2)


def _find(file: h5py.File, name: str, allow_external: bool) -> h5py.Dataset:
    """Return dataset `name`, or say what there is instead."""
    found = _walk(file, name, allow_external)
    if found is None:
        raise DataError(f"{file.filename}: no dataset {name!r}", _listing(file))
    if not isinstance(found, h5py.Dataset):
        raise DataError(f"{file.filename}: {name!r} is a group, not a dataset", _listing(file))
    return found


def _walk(file: h5py.File, name: str, allow_external: bool) -> h5py.Group | h5py.Dataset | None:
    """Walk to `name` link by link, so that no link leads HDF5 elsewhere unseen; `None` when it leads nowhere.

    The low-level calls matter: `part in group` would already follow the link, and open the other file.
    """
    found: h5py.Group | h5py.Dataset = file["/"]
    parts = deque(name.split("/"))
    soft_links = 0
    while parts:
        part = parts.popleft()
        if part in ("", "."):
            continue
        if not isinstance(found, h5py.Group) or not found.id.links.exists(part.encode()):
            return None
        kind = found.id.links.get_info(part.encode()).type
        if kind == h5py.h5l.TYPE_SOFT:
            target = os.fsdecode(found.id.links.get_val(part.encode()))
            soft_links += 1
            if soft_links > MAX_SOFT_LINKS:
                raise DataError(f"{file.filename}: {name!r} leads through more than {MAX_SOFT_LINKS} soft links")
            parts.extendleft(reversed(target.split("/")))
            found = file["/"] if target.startswith("/") else found
        elif kind == h5py.h5l.TYPE_HARD or allow_external:
            found = _follow(found, part, file, name)
        else:
            raise _elsewhere(file, name, f"link {part!r} leads out of it")
    return found


def _follow(group: h5py.Group, part: str, file: h5py.File, name: str) -> h5py.Group | h5py.Dataset:
    try:
        return group[part]
    except (KeyError, OSError) as exc:
        raise DataError(f"{file.filename}: {name!r} cannot be opened at {part!r}: {exc}", _listing(file)) from exc


def _refuse_other_files(dataset: h5py.Dataset, depth: int) -> None:
    """Raise when the data of `dataset`, or of the datasets that it is put together from, lies in another file."""
    plist = dataset.id.get_create_plist()
    if plist.get_external_count():
        raise _elsewhere(dataset.file, dataset.name, f"its data lies in {os.fsdecode(plist.get_external(0)[0])!r}")
    if plist.get_layout() != h5py.h5d.VIRTUAL:
        return
    for i in range(plist.get_virtual_count()):
        source, name = plist.get_virtual_filename(i), plist.get_virtual_dsetname(i)
        # A '%' makes HDF5 try a series of names, which cannot be checked beforehand.
        if source != "." or "%" in name or depth >= MAX_VIRTUAL_DEPTH:
            raise _elsewhere(dataset.file, dataset.name, f"part of it lies in {source!r}, {name!r}")
        part = _walk(dataset.file, name, False)
        if isinstance(part, h5py.Dataset):  # a missing part is legal: HDF5 puts the fill value there
            _refuse_other_files(part, depth + 1)


def _elsewhere(file: h5py.File, name: str, how: str) -> DataError:
    hint = "if you trust this file, open it with HDF5Matrix.trusting(...) or set HDF5Matrix.allow_external = True"
    return DataError(f"{file.filename}: dataset {name!r} reads another file: {how}", hint)


def _listing(file: h5py.File) -> str:
    """Return the names at the top of the file, for a hint."""
    names = sorted(file.keys())
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    return f"the file has {shown}" if names else "the file is empty"
