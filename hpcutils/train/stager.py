"""From a job to its files on this node: there before training begins, or on their way while it does (`data.stage: overlap`)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpcutils.data.shared import threads_may_call_mpi
from hpcutils.errors import DataError, HpcutilsError, IntegrityError, SpecError
from hpcutils.log import LOGGER
from hpcutils.specs.job import Job
from hpcutils.staging.items import Settings, Staged
from hpcutils.staging.leaders import Leaders
from hpcutils.staging.overlay import Arriving, can_be_read_through
from hpcutils.staging.stage import Coming, begin_item, begin_manifest
from hpcutils.staging.unpacked import unpack_archive
from hpcutils.staging.want import item_of, listed_in, manifest_of, settings_of, source_of
from hpcutils.train.arrivals import Arrivals
from hpcutils.train.ranks import Ranks


@dataclass
class Found:
    """What one leader knows of the job's files.

    Args:
        staged: The files by name: where they are, or will be.
        comings: The datasets, in the order in which all leaders move them.
        arriving: Those files that are not here yet, each with the number of its dataset.
    """

    staged: dict[str, Staged] = field(default_factory=dict)
    comings: list[Coming] = field(default_factory=list)
    arriving: dict[str, tuple[int, Arriving]] = field(default_factory=dict)


def stage_files(job: Job, job_folder: Path, ranks: Ranks) -> Arrivals:
    """Have every data file on this node, or on its way; one rank a node does the work, and all ranks fail together."""
    leaders, overlap = _leaders(job, ranks)
    found = Found()

    def work() -> tuple[dict[str, Staged], dict[str, tuple[int, Arriving]], list[dict[str, Any]]]:
        stage(job, job_folder, leaders, found, overlap=overlap)
        return found.staged, found.arriving, [coming.outcome.record() for coming in found.comings if coming.outcome is not None]

    staged, arriving, records = ranks.on_leaders(work)
    digests = ranks.gather([file.sha256 for file in staged.values()])
    if any(other != digests[0] for other in digests):
        raise DataError(
            "the nodes staged different bytes of the same data",
            "the source changed while the job started: submit it again",
        )
    return Arrivals(ranks, staged, records, arriving, found.comings)


def _leaders(job: Job, ranks: Ranks) -> tuple[Leaders, bool]:
    """Return who stages, and whether they may go on while steps run.

    In the background they need messages of their own, and an MPI that any thread may call. A leader alone sends none.
    """
    comm, node = ranks.leader_comm, ranks.world.node
    overlap = job.data.stage == "overlap"
    if comm is None or comm.size == 1:
        return Leaders(None, node), overlap
    if overlap and not threads_may_call_mpi():
        if comm.rank == 0:
            LOGGER.warning("MPI was not started for threads: data is staged before training, not meanwhile")
        overlap = False
    return Leaders(comm.Dup() if overlap else comm, node), overlap


def stage(job: Job, job_folder: Path, leaders: Leaders, found: Found, *, overlap: bool = False) -> None:
    """Stage the manifest, if there is one, and the files that it does not list; unpack what is an archive.

    Args:
        job: The job.
        job_folder: Where its paths start from.
        leaders: One rank of each node.
        found: What is filled.
        overlap: Leave the moving for later where a file can be read meanwhile.
    """
    settings = leaders.together(lambda: settings_of(job))
    try:
        _stage_listed(job, job_folder, settings, leaders, found, overlap)
        for file in (file for file in job.data.files if file.name not in found.staged):
            item = item_of(file, job_folder)
            coming = begin_item(item, _what_is_left(settings, found), leaders)
            _settle(coming, {file.name: (item.name, item.sha256)}, leaders, found, overlap)
    except HpcutilsError:
        for coming in found.comings:
            coming.give_up()
        raise
    for file in (file for file in job.data.files if file.extract is not None):
        packed = found.staged[file.name]
        path = unpack_archive(packed.path, packed.sha256, file.extract or "", settings, leaders)
        found.staged[file.name] = Staged(path, packed.sha256, packed.moved_bytes)


def _stage_listed(
    job: Job, job_folder: Path, settings: Settings, leaders: Leaders, found: Found, overlap: bool
) -> None:  # fmt: skip
    manifest = manifest_of(job, job_folder)
    if manifest is None:
        return
    listed = leaders.together(lambda: listed_in(manifest, job.data.files, job_folder))
    for file in job.data.files:
        said = listed.get(file.name, ("", None))[1]
        if None not in (said, file.sha256) and said != file.sha256:
            raise IntegrityError(f"{file.name}: train.yaml and {manifest.name} name different sha256", "make the manifest again")
        if overlap and file.name not in listed and file.sha256 is None:
            raise SpecError(
                f"{file.name} has no sha256, and {manifest.name} does not list it: 'stage: overlap' must know what arrives",
                "add its sha256 to train.yaml, list it in the manifest, or use 'stage: before'",
            )
    coming = begin_manifest(manifest, source_of(job, job_folder), settings, leaders)
    _settle(coming, listed, leaders, found, overlap)


def _what_is_left(settings: Settings, found: Found) -> Settings:
    """Return the settings for one more dataset: those that are to be moved yet have taken no room so far."""
    return replace(settings, promised_bytes=sum(coming.move_bytes for coming in found.comings if coming.outcome is None))


def _settle(
    coming: Coming, files: dict[str, tuple[str, str | None]], leaders: Leaders, found: Found, overlap: bool
) -> None:  # fmt: skip
    """Have a dataset here, unless its files can be read meanwhile.

    Args:
        coming: The dataset.
        files: The job's files of it, by name: the path in it, and the sha256 where it is known.
        leaders: One rank of each node.
        found: What is filled.
        overlap: Whether to leave it for later.
    """
    number = len(found.comings)
    if not overlap or not _may_wait(coming, [path for path, _ in files.values()], leaders):
        coming.finish()
    found.comings.append(coming)
    for name, (path, sha256) in files.items():
        known = coming.outcome.digest if coming.outcome is not None else coming.dataset.key
        moved = coming.outcome.origin_bytes if coming.outcome is not None and coming.dataset.manifest is None else 0
        found.staged[name] = Staged(coming.place.files / path, sha256 or known, moved)
        file = coming.arriving(path) if coming.outcome is None else None
        if file is not None:
            found.arriving[name] = number, file


def _may_wait(coming: Coming, paths: list[str], leaders: Leaders) -> bool:
    """Say whether the files of a dataset can be read through to its source; all leaders say the same."""
    if coming.outcome is not None:
        return False

    def asks() -> bool:
        files = [coming.arriving(path) for path in paths]
        return all(file is None or can_be_read_through(file) for file in files)

    may = all(leaders.gather(leaders.together(asks)))
    if not may and leaders.rank == 0:
        LOGGER.warning("%s: its server knows no ranges; it is staged before training, not meanwhile", coming.dataset.name)
    return may
