"""Opening an HDF5 dataset for reading: one handle a process, opened again when the file was replaced, and no traps.

A file can point elsewhere: external links, external storage and virtual datasets make HDF5 open any other file of the host
that the user may read. They are refused unless the caller asked for them, before HDF5 follows them.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import h5py

from hpcutils.data.arriving import NO_DEVICE, ByteSource, SourceFile, source_identity
from hpcutils.data.readers import Reader, Token, choose_reader
from hpcutils.errors import DataError

# Device, inode, time of change in nanoseconds, bytes: differs when the file at a path was replaced or written.
Identity: TypeAlias = tuple[int, int, int, int]

MAX_SOFT_LINKS = 32
MAX_VIRTUAL_DEPTH = 8


@dataclass(frozen=True, eq=False)
class OpenDataset:
    """A dataset of an open file, as one process sees it."""

    file: h5py.File
    reader: Reader
    identity: Identity
    token: Token
    pid: int = field(default_factory=os.getpid)

    def is_current(self, path: str) -> bool:
        """Tell whether this process opened it and the file at `path` is still the same: or, of one that arrives, not there yet."""
        if self.pid != os.getpid():
            return False
        return not os.path.exists(path) if self.is_arriving else self.identity == identity_of(path)  # noqa: PTH110 - once a batch

    @property
    def is_arriving(self) -> bool:
        """Whether its bytes come from a `ByteSource`."""
        return self.identity[0] == NO_DEVICE


class _Opened:
    """The handles of this process, and of the process that it was forked from; `lock` is held while one is opened."""

    def __init__(self) -> None:
        self.handles: weakref.WeakSet[OpenDataset] = weakref.WeakSet()
        self.renew()

    def renew(self) -> None:
        self.lock = threading.RLock()

    def close_stale(self, identity: Identity) -> None:
        """Close what was inherited from a parent process, or belongs to an older state of the same file.

        HDF5 keeps one structure for each file a process has open. Without this, opening the file again would be given
        the old structure: with the parent's descriptor, or with the old contents.
        """
        for handle in list(self.handles):
            rewritten = handle.identity[:2] == identity[:2] and handle.identity != identity
            if handle.pid != os.getpid() or rewritten:
                handle.file.close()
                self.handles.discard(handle)

    def close_arriving(self) -> None:
        """Close files that are read through Python: HDF5 would do it after the end of the interpreter, and crash."""
        for handle in list(self.handles):
            if handle.is_arriving and handle.pid == os.getpid():
                handle.file.close()


OPENED = _Opened()
os.register_at_fork(after_in_child=OPENED.renew)
atexit.register(OPENED.close_arriving)


def identity_of(path: str) -> Identity:
    """Return what changes when the file at `path` is replaced or written: device, inode, time of change (ns), bytes.

    Raises:
        DataError: There is no such file, or it may not be looked at.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - asked once a batch
    except OSError as exc:
        raise DataError(f"{path}: {exc.strerror}", "check the path, and that the data was staged to this node") from exc
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def open_dataset(path: str, name: str, allow_external: bool, source: ByteSource | None = None) -> OpenDataset:
    """Open dataset `name` of the file at `path`, read-only and without locks (shared file systems may lack them).

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
            handle = OpenDataset(file, choose_reader(file, dataset, token, source), identity, token)
        except BaseException:
            file.close()
            raise
        OPENED.handles.add(handle)
        return handle


def _open_file(path: str, source: ByteSource | None) -> h5py.File:
    try:
        return h5py.File(path if source is None else SourceFile(source, path), "r", locking=False)
    except OSError as exc:
        reason = "is a folder" if Path(path).is_dir() else str(exc)
        raise DataError(f"{path}: not a readable HDF5 file: {reason}", "an .h5 or .hdf5 file was expected") from exc


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
