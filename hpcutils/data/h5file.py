"""Opening an HDF5 dataset for reading: one handle a process, opened again when the file was replaced, and no traps.

A file can point elsewhere: external links, external storage and virtual datasets make HDF5 open any other file of the host
that the user may read. They are refused unless the caller asked for them, before HDF5 follows them. So are datasets that claim to
be larger than what is stored of them can be (`hpcutils.data.claims`).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import h5py

from hpcutils.data.claims import backed_bytes, why_not_believable
from hpcutils.data.readers import Reader, Token, choose_reader
from hpcutils.data.views import RowRun, ViewReader, row_runs
from hpcutils.errors import DataError

# Device, inode, time of change in nanoseconds, bytes: differs when the file at a path was replaced or written.
Identity: TypeAlias = tuple[int, int, int, int]
Sources: TypeAlias = "tuple[tuple[str, OpenDataset], ...]"

MAX_SOFT_LINKS = 32
MAX_VIRTUAL_DEPTH = 8
TRUST = (
    "if you trust this file, say 'data: {trust_files: true}' in train.yaml; in Python, open it with HDF5Matrix.trusting(...) "
    "or set HDF5Matrix.allow_external = True"
)


@dataclass(frozen=True, eq=False)
class OpenDataset:
    """A dataset of an open file, as one process sees it; `sources` are those of other files that it shows, by path."""

    file: h5py.File
    reader: Reader
    identity: Identity
    token: Token
    sources: tuple[tuple[str, OpenDataset], ...] = ()
    pid: int = field(default_factory=os.getpid)

    def is_current(self, path: str) -> bool:
        """Tell whether this process opened it and the file at `path` is still the same."""
        same = self.pid == os.getpid() and self.identity == identity_of(path)
        return same and all(source.is_current(its_path) for its_path, source in self.sources)

    def close(self) -> None:
        """Let go of the file, and of the sources'."""
        self.file.close()
        for _, source in self.sources:
            source.close()


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
                handle.close()
                self.handles.discard(handle)


OPENED = _Opened()
os.register_at_fork(after_in_child=OPENED.renew)


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


def open_dataset(path: str, name: str, allow_external: bool) -> OpenDataset:
    """Open dataset `name` of the file at `path`, read-only and without locks (shared file systems may lack them).

    Raises:
        DataError: No such file or dataset, not HDF5, no rows; or, without `allow_external`, data in other files, or more data
            than the stored bytes can be.
    """
    with OPENED.lock:
        identity = identity_of(path)
        OPENED.close_stale(identity)
        file = _open_file(path)
        try:
            dataset = _find(file, name, allow_external)
            if not allow_external:
                _refuse_other_files(dataset, 0)
                _refuse_false_claims(dataset)
            if not dataset.shape:
                raise DataError(f"{path}: dataset {name!r} has no rows: its shape is {dataset.shape}", _listing(file))
            token = (*identity, dataset.name)
            reader, sources = _reader_of(file, dataset, token, 0)
            handle = OpenDataset(file, reader, identity, token, sources)
        except BaseException:
            file.close()
            raise
        OPENED.handles.add(handle)
        return handle


def _reader_of(file: h5py.File, dataset: h5py.Dataset, token: Token, depth: int) -> tuple[Reader, Sources]:
    """Return the reader of a dataset that may be read, and what it opened of other files; the caller closes that."""
    readable = dataset.is_virtual and file.id.get_intent() == h5py.h5f.ACC_RDONLY and depth < MAX_VIRTUAL_DEPTH
    runs = row_runs(dataset) if readable else None
    opened: dict[tuple[str, str], tuple[Reader, Sources]] = {}
    for run in runs or []:
        key = (run.file, run.dataset)
        found = opened.get(key) or _source_of(file, run, token, depth)
        if found is None or found[0].shape[1:] != dataset.shape[1:] or found[0].dtype != dataset.dtype:
            break
        opened[key] = found
        there = found[0].shape[0]
        if run.first + run.rows > there or (run.all and run.rows != there):
            break
    else:
        if runs:
            readers = [opened[run.file, run.dataset][0] for run in runs]
            return ViewReader(runs, readers, dataset.shape), tuple(s for _, more in opened.values() for s in more)
    for _, sources in opened.values():
        for _, source in sources:
            source.close()
    return choose_reader(file, dataset, token), ()


def _source_of(file: h5py.File, run: RowRun, token: Token, depth: int) -> tuple[Reader, Sources] | None:
    """Return the reader of a virtual dataset's source, and what it opened; `None` where HDF5 must say what is there."""
    if run.file == ".":
        part = _walk(file, run.dataset, True)
        return _reader_of(file, part, (*token, part.name), depth + 1) if isinstance(part, h5py.Dataset) and part.shape else None
    if "HDF5_VDS_PREFIX" in os.environ:
        return None
    path = str(Path(file.filename).parent / run.file)
    try:
        source = open_dataset(path, run.dataset, True)
    except DataError:  # a source that is missing is legal
        return None
    return source.reader, ((path, source),)


def _open_file(path: str) -> h5py.File:
    try:
        return h5py.File(path, "r", locking=False)
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


def _refuse_false_claims(dataset: h5py.Dataset) -> None:
    """Raise when `dataset`, or one that it is put together from, says that it is larger than it can be."""
    parts = _parts(dataset)
    for part in parts:
        _refuse_false_claims(part)
    backed = sum(backed_bytes(part) for part in parts) if dataset.is_virtual else None
    wrong = why_not_believable(dataset, backed)
    if wrong is not None:
        raise DataError(f"{dataset.file.filename}: dataset {dataset.name!r} is not believable: {wrong}", TRUST)


def _parts(dataset: h5py.Dataset) -> list[h5py.Dataset]:
    """Return the datasets of the same file that a virtual one shows, each once; those of a virtual part in its place."""
    if not dataset.is_virtual:
        return []
    plist = dataset.id.get_create_plist()
    found: dict[str, h5py.Dataset] = {}
    for name in {plist.get_virtual_dsetname(i) for i in range(plist.get_virtual_count())}:
        part = _walk(dataset.file, name, False)
        for real in (_parts(part) or [part]) if isinstance(part, h5py.Dataset) else []:
            found[real.name] = real
    return list(found.values())


def _elsewhere(file: h5py.File, name: str, how: str) -> DataError:
    return DataError(f"{file.filename}: dataset {name!r} reads another file: {how}", TRUST)


def _listing(file: h5py.File) -> str:
    """Return the names at the top of the file, for a hint."""
    names = sorted(file.keys())
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    return f"the file has {shown}" if names else "the file is empty"
