"""Opening an HDF5 dataset for reading: one handle a process, opened again when the file was replaced, and no traps.

A file can point elsewhere: external links, external storage and virtual datasets make HDF5 open any other file of the host
that the user may read. They are refused unless the caller asked for them, before HDF5 follows them. So are datasets that claim to
be larger than what is stored of them can be (`hpcutils.data.claims`).
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
from hpcutils.data.claims import backed_bytes, why_not_believable
from hpcutils.data.readers import Reader, Token, choose_reader
from hpcutils.data.views import RowRun, ViewReader, row_runs
from hpcutils.errors import DataError

# Device, inode, bytes, times of change of the data and of the inode (ns): differs when the file at a path was replaced or
# written. Tools that copy times can restore the former, not the latter; a new link or other rights change it, too, and cost
# one opening.
Identity: TypeAlias = tuple[int, int, int, int, int]
Sources: TypeAlias = "tuple[tuple[str, OpenDataset], ...]"

# What h5py does when it is not told, none, HDF5's strict locks, and those that pass over file systems without any.
LOCKINGS: tuple[bool | str | None, ...] = (None, False, True, "best-effort")

MAX_SOFT_LINKS = 32
MAX_VIRTUAL_DEPTH = 8
TRUST = (
    "if you trust this file, say 'data: {trust_files: true}' in train.yaml; in Python, open it with HDF5Matrix.trusting(...) "
    "or set HDF5Matrix.allow_external = True"
)
ARRIVES = "a file can only read others when it is there: with 'stage: before' in train.yaml, and then with 'trust_files: true'"


@dataclass(eq=False)
class OpenDataset:
    """A dataset of an open file, as one process sees it.

    Attributes:
        sources: The datasets of other files that it shows, by path.
        is_shut: Whether `shut` closed it, maybe under a thread that reads.
    """

    file: h5py.File
    reader: Reader
    identity: Identity
    token: Token
    process: object
    sources: Sources = ()
    is_shut: bool = False

    def is_ours(self) -> bool:
        """Tell whether this process opened it, and not one that it was forked from."""
        return self.process is OPENED.process

    def is_current(self, path: str) -> bool:
        """Tell whether this process opened it and the file at `path` is still the same: 2 us, most of it for `stat`.

        One that arrives is current as long as there is none at `path`.

        Raises:
            DataError: A source is gone: HDF5 would make up its rows.
        """
        if self.is_shut or self.process is not OPENED.process:
            return False
        try:
            status = os.stat(path)  # noqa: PTH116 - asked for each request
        except OSError:
            return self.is_arriving  # opening says why
        same = self.identity == _identity(status)
        return same and (not self.sources or all(identity_of(there) and source.is_current(there) for there, source in self.sources))

    @property
    def is_arriving(self) -> bool:
        """Whether its bytes come from a `ByteSource`."""
        return self.identity[0] == NO_DEVICE

    def was_shut(self) -> bool:
        """Tell whether a read may have failed because a file was closed under it: its own, or a source's."""
        return self.is_shut or any(source.was_shut() for _, source in self.sources)

    def shut(self) -> None:
        """Close the file, and the sources'. The flag comes first: a read that fails because of this finds it set."""
        self.is_shut = True
        self.file.close()
        for _, source in self.sources:
            source.shut()


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
        DataError: No such file or dataset, not HDF5, no rows; or, without `allow_external`, data in other files, or more data
            than the stored bytes can be. A file that arrives never reads others.
    """
    with OPENED.lock:
        if source is not None and Path(path).exists():
            source = None
        identity = identity_of(path) if source is None else source_identity(source)
        OPENED.close_stale(identity)
        file = _open_file(path, source)
        try:
            may_lead_out = allow_external and source is None
            dataset = _find(file, name, may_lead_out)
            if not may_lead_out:
                _refuse_other_files(dataset, 0)
            if not allow_external:
                _refuse_false_claims(dataset)
            if not dataset.shape:
                raise DataError(f"{path}: dataset {name!r} has no rows: its shape is {dataset.shape}", _listing(file))
            token = (*identity, dataset.name)
            reader, sources = _reader_of(file, dataset, token, 0, source)
            handle = OpenDataset(file, reader, identity, token, OPENED.process, sources)
        except BaseException:
            file.close()
            raise
        OPENED.handles.add(handle)
        return handle


def _reader_of(
    file: h5py.File, dataset: h5py.Dataset, token: Token, depth: int, bytes_of: ByteSource | None
) -> tuple[Reader, Sources]:
    """Return the reader of a dataset that may be read, and what it opened of other files; the caller closes that.

    `bytes_of` is where the bytes of a file come from that arrives; it reads no other file.
    """
    if dataset.file.filename != file.filename:
        # A link led out of the file: bytes, locks and changes are the other's.
        home = os.path.abspath(dataset.file.filename)  # noqa: PTH100 - resolves no links
        linked = open_dataset(home, dataset.name, True)
        return linked.reader, ((home, linked),)
    readable = dataset.is_virtual and file.id.get_intent() == h5py.h5f.ACC_RDONLY and depth < MAX_VIRTUAL_DEPTH
    runs = row_runs(dataset) if readable else None
    opened: dict[tuple[str, str], tuple[Reader, Sources]] = {}
    for run in runs or []:
        key = (run.file, run.dataset)
        found = opened.get(key) or _source_of(file, run, token, depth, bytes_of)
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
            source.shut()
    return choose_reader(file, dataset, token, bytes_of), ()


def _source_of(
    file: h5py.File, run: RowRun, token: Token, depth: int, bytes_of: ByteSource | None
) -> tuple[Reader, Sources] | None:
    """Return the reader of a virtual dataset's source, and what it opened; `None` where HDF5 must say what is there."""
    if run.file == ".":
        part = _walk(file, run.dataset, True)
        if not isinstance(part, h5py.Dataset) or not part.shape:
            return None
        return _reader_of(file, part, (*token, part.name), depth + 1, bytes_of)
    if "HDF5_VDS_PREFIX" in os.environ:
        return None
    path = str(Path(file.filename).parent / run.file)
    try:
        source = open_dataset(path, run.dataset, True)
    except DataError:  # a source that is missing is legal
        return None
    return source.reader, ((path, source),)


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
    hint = ARRIVES if file.driver == "fileobj" else TRUST
    return DataError(f"{file.filename}: dataset {name!r} reads another file: {how}", hint)


def _listing(file: h5py.File) -> str:
    """Return the names at the top of the file, for a hint."""
    names = sorted(file.keys())
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    return f"the file has {shown}" if names else "the file is empty"
