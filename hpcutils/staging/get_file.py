"""`get_file`: a file from the web in a local cache, verified, unpacked if asked, and fetched once.

arguments ─► FileRequest ─► plan_download (pure) ─► [turn] download ─► unpack ─► publish ─► settle
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hpcutils import fs
from hpcutils.errors import DataError, IntegrityError, SpecError
from hpcutils.hashing import algorithm_of, digest_file
from hpcutils.log import LOGGER
from hpcutils.staging.download import FetchResult, check_digest, disk_errors_named, fetch, transfer
from hpcutils.staging.progress import Progress, progress_for
from hpcutils.staging.sources import shown
from hpcutils.staging.turn import tidy, turn

if TYPE_CHECKING:
    from hpcutils.staging.members import Limits
    from hpcutils.staging.settle import Parcel

ARCHIVE_FORMATS = ("tar", "zip")


@dataclass(frozen=True)
class FileRequest:
    """What a call asks for, with every default filled in.

    Args:
        origin: URL or path.
        target: Where the file is kept.
        returned: What the caller gets: `target`, or the folder with `untar`.
        digest: Expected, in lower case; `None` accepts any.
        algorithm: Of the digest.
        formats: Archive formats to try; empty when nothing is to be unpacked.
    """

    origin: str
    target: Path
    returned: Path
    digest: str | None
    algorithm: str
    formats: tuple[str, ...]


@dataclass(frozen=True)
class DownloadPlan:
    """What has to be done for a file.

    Args:
        action: `present` (take it as it is), `verify` (hash it; fetch it when that fails) or `fetch`.
        target: Where the file is kept.
        origin: Where it comes from.
    """

    action: Literal["present", "verify", "fetch"]
    target: Path
    origin: str


def plan_download(request: FileRequest, exists: bool) -> DownloadPlan:
    """Say what has to be done, given whether the file is there."""
    action: Literal["present", "verify", "fetch"]
    action = "fetch" if not exists else "present" if request.digest is None else "verify"
    return DownloadPlan(action, request.target, request.origin)


def get_file(
    fname: str | os.PathLike[str],
    origin: str,
    untar: bool = False,
    md5_hash: str | None = None,
    file_hash: str | None = None,
    cache_subdir: str | os.PathLike[str] = "datasets",
    hash_algorithm: str = "auto",
    extract: bool = False,
    archive_format: str | Sequence[str] | None = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
) -> str:
    """Return the path of a file, fetched from `origin` if the cache does not have it.

    The file appears whole and verified, or not at all. Several processes may call at once.

    Args:
        fname: Name in the cache, without `..`. An absolute path is used as it is.
        origin: http, https or file URL, or a path.
        untar: Unpack the tar and return the path of the folder `fname`; the file is kept as `fname.tar.gz`.
        md5_hash: Expected md5; the older way to say `file_hash`.
        file_hash: Expected digest, in either case. A file that is there with another one is fetched again.
        cache_subdir: Folder in the cache. An absolute path is used as it is.
        hash_algorithm: `md5`, `sha1`, `sha256`, `sha512`, or `auto`: by the digest's length.
        extract: Unpack the archive into the folder that holds it.
        archive_format: `tar` (also gzip, bzip2, xz), `zip`, a list of them, or `auto` for both; `None` tries none.
        cache_dir: Root of the cache; `None` is `$KERAS_HOME`, or `~/.keras`.

    Returns:
        The absolute or relative path, as the arguments give it, of the file; with `untar` of the folder.

    Raises:
        IntegrityError: What came has another digest; also a `ValueError`. A file that was there with a wrong one, too, is
            removed.
        ArchiveError: The archive is damaged, too large or hostile, or would overwrite a file that is not its own.
        DataError: The origin cannot be had, or the cache cannot be written.
        SpecError: An argument cannot be read as meant.

    Example:
        get_file("mnist.npz", "https://example.org/mnist.npz", file_hash="731c5ac6…")
    """
    request = read_request(
        fname, origin, untar, md5_hash, file_hash, cache_subdir, hash_algorithm, extract, archive_format, cache_dir,
        os.environ,
    )  # fmt: skip
    run_request(request)
    return str(request.returned)


def read_request(
    fname: str | os.PathLike[str],
    origin: str,
    untar: bool,
    md5_hash: str | None,
    file_hash: str | None,
    cache_subdir: str | os.PathLike[str],
    hash_algorithm: str,
    extract: bool,
    archive_format: str | Sequence[str] | None,
    cache_dir: str | os.PathLike[str] | None,
    environ: Mapping[str, str],
) -> FileRequest:
    """Fill in what `get_file`'s arguments leave open; touches no disk.

    Raises:
        SpecError: An argument cannot be read as meant.
    """
    _check_names(os.fspath(fname), cache_subdir, cache_dir)
    if md5_hash is not None and file_hash is None:
        file_hash, hash_algorithm = md5_hash, "md5"
    algorithm = _algorithm(hash_algorithm, file_hash)
    check_digest(file_hash, algorithm)
    root = Path(cache_dir if cache_dir is not None else environ.get("KERAS_HOME") or "~/.keras").expanduser()
    returned = root / cache_subdir / fname
    target = returned.with_name(f"{returned.name}.tar.gz") if untar else returned
    formats = ("tar",) if untar else _formats(archive_format, fname) if extract else ()
    return FileRequest(os.fspath(origin), target, returned, file_hash and file_hash.lower(), algorithm, formats)


def _check_names(fname: str, *folders: str | os.PathLike[str] | None) -> None:
    if not fname or fname.endswith("/"):
        raise SpecError(f"fname {fname!r} names no file", "give the name that the file has in the cache")
    if ".." in Path(fname).parts:
        raise SpecError(f"fname {fname!r} leads out of the cache", "give an absolute path, or another cache_dir or cache_subdir")
    for name in (fname, *(os.fspath(folder) for folder in folders if folder is not None)):
        if "\0" in name:
            raise SpecError(f"{name!r} holds a NUL, which no path can", "check fname, cache_subdir and cache_dir")


def _algorithm(hash_algorithm: str, file_hash: str | None) -> str:
    if hash_algorithm != "auto":
        return hash_algorithm
    return "sha256" if file_hash is None else algorithm_of(file_hash)


def _formats(archive_format: str | Sequence[str] | None, fname: str | os.PathLike[str]) -> tuple[str, ...]:
    named = (archive_format,) if isinstance(archive_format, str) else tuple(archive_format or ())
    formats = ARCHIVE_FORMATS if named == ("auto",) else named
    if unknown := [name for name in formats if name not in ARCHIVE_FORMATS]:
        raise SpecError(f"unknown archive_format {unknown[0]!r}", "auto, tar, zip, a list of these, or None")
    if not formats:
        LOGGER.warning("%s: no match found: archive_format names no format, so nothing is unpacked", os.fspath(fname))
    return formats


def run_request(request: FileRequest) -> None:
    """Do what the request lacks; nothing when the cache has it all.

    Raises:
        IntegrityError, ArchiveError, DataError: As `get_file`.
    """
    with disk_errors_named(request.target), fs.no_new_folders_on_failure(request.target.parent):
        if _is_here(request) and _is_settled(request):
            tidy(request.target)
        else:
            with turn(request.target):
                _complete(request)
    if not request.returned.exists():
        LOGGER.warning("%s: the archive holds no folder of this name; see what lies beside it", request.returned)


def extract_once(archive: Path, formats: Sequence[str] = ARCHIVE_FORMATS, limits: Limits | None = None) -> None:
    """Unpack an archive of the cache beside itself, unless that was done before.

    Args:
        archive: The file; its content goes into the folder it lies in.
        formats: What to try, in order: `tar`, `zip`.
        limits: What it may become; `None` is `Limits.of(archive)`.

    Raises:
        ArchiveError: It is damaged or refused, or another file is in the way. The folder is as it was.
        DataError: The folder cannot be written.

    Example:
        extract_once(Path(get_file("zeros.tar.xz", url)), limits=Limits(unpacked_bytes=200 * 10**9))
    """
    request = FileRequest(str(archive), archive, archive, None, "sha256", tuple(formats))
    with disk_errors_named(archive), turn(archive):
        if not _is_settled(request):
            _extract(request, limits)


def _complete(request: FileRequest) -> None:
    """Do what is missing; what another process did while this one waited for its turn is not done again."""
    if not _is_here(request):
        _download(request)
    elif not _is_settled(request):
        _extract(request, None)


def _is_here(request: FileRequest) -> bool:
    plan = plan_download(request, request.target.exists())
    if request.target.is_dir():
        raise DataError(f"{request.target} is a folder, and a file is to go there", "give another fname")
    if plan.action == "verify":
        return digest_file(request.target, request.algorithm) == request.digest
    return plan.action == "present"


def _is_settled(request: FileRequest) -> bool:
    if not request.formats:
        return True
    # The readers of archives are imported only by who needs them.
    from hpcutils.staging.settle import is_unpacked

    return is_unpacked(request.target)


def _download(request: FileRequest) -> None:
    if request.target.exists():
        LOGGER.warning("%s has another %s than the expected one: fetching it again", request.target, request.algorithm)
    try:
        result = _fetch(request)
    except IntegrityError:
        _remove_wrong(request)
        raise
    if request.digest is None:
        LOGGER.info("%s: file_hash='%s' would verify it (%s)", request.target, result.digest, request.algorithm)


def _fetch(request: FileRequest) -> FetchResult:
    if request.formats:
        return _fetch_and_unpack(request)
    return fetch(
        request.origin, request.target, digest=request.digest, algorithm=request.algorithm, progress=_progress(request)
    )  # fmt: skip


def _remove_wrong(request: FileRequest) -> None:
    """Remove the file that is there if it is none of what was asked for: a call without a digest would take it as it is.

    Only once the origin gave another wrong one: while it cannot be reached, an old file is better than none.
    """
    if request.target.exists() and not _is_here(request):
        LOGGER.warning("%s has another %s than the expected one, and so has the origin: removed", request.target, request.algorithm)
        request.target.unlink(missing_ok=True)


def _fetch_and_unpack(request: FileRequest) -> FetchResult:
    """Unpack what came before it is published: a bad archive leaves no trace, and the next call fetches it again."""
    from hpcutils.staging.settle import deliver, scratch

    with scratch(request.target) as tree:
        with fs.publishing(request.target) as temporary:
            result = transfer(
                request.origin, temporary, digest=request.digest, algorithm=request.algorithm,
                progress=_progress(request),
            )  # fmt: skip
            parcel = _parcel(temporary, tree, request, None)
        deliver(parcel)
    return result


def _extract(request: FileRequest, limits: Limits | None) -> None:
    from hpcutils.staging.settle import deliver, scratch

    with scratch(request.target) as tree:
        deliver(_parcel(request.target, tree, request, limits))


def _parcel(packed: Path, tree: Path, request: FileRequest, limits: Limits | None) -> Parcel:
    from hpcutils.staging.archive import unpack
    from hpcutils.staging.members import Limits
    from hpcutils.staging.settle import plan_parcel

    names = unpack(packed, tree, request.formats, limits or Limits.of(packed), request.target.name)
    return plan_parcel(tree, request.target, names)


def _progress(request: FileRequest) -> Progress:
    return progress_for(request.target.name, title=f"fetching {shown(request.origin)}")
