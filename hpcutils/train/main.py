"""One rank's whole life, top to bottom: stage, open, build, train, record."""

from __future__ import annotations

import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

from hpcutils import __version__
from hpcutils.errors import DataError, IntegrityError, WorldError
from hpcutils.log import LOGGER
from hpcutils.rundir import RunDirectory, read_json, write_json
from hpcutils.specs.job import Job, read_job
from hpcutils.staging.leaders import Leaders
from hpcutils.staging.stage import Outcome, Settings, Staged, stage_item, stage_manifest
from hpcutils.staging.unpacked import unpack_archive
from hpcutils.staging.want import item_of, listed_in, manifest_of, settings_of, source_of
from hpcutils.train import devices
from hpcutils.train.preflight import preflight
from hpcutils.train.ranks import Ranks
from hpcutils.world import World


def train(run: RunDirectory, world: World) -> dict[str, Any]:
    """Train the run's job as one of its ranks; returns what rank 0 writes to `result.json`."""
    started = time.perf_counter()
    job, submission = read_job(run.job.read_text()), read_json(run.submission)
    preflight(world, wants_gpus=job.resources.devices == "gpu")
    ranks = Ranks(world)
    expected = submission["nodes"] * submission["ranks_per_node"]
    if world.world_size != expected:
        raise WorldError(
            f"the job is for {expected} ranks, and {world.world_size} started",
            "submit it anew; do not call srun by hand",
        )

    # The data moves while TensorFlow, seconds to import, is not needed yet.
    staged, staging = stage_files(job, Path(submission["job_folder"]), ranks)
    devices.prepare(job)
    names = ranks.together(lambda: devices.configure(job, world, submission["devices_per_rank"]))

    from hpcutils.train import session

    outcome = session.run(job, run, ranks, staged, names)
    peaks_mb = ranks.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    result = {
        "run": run.run_id,
        "nodes": submission["nodes"],
        "world_size": world.world_size,
        "replicas": world.world_size * len(names),
        "seconds": round(time.perf_counter() - started, 2),
        "peak_rss_mb": [round(peak, 1) for peak in peaks_mb],
        **outcome,
    }
    if world.rank == 0:
        write_json(run.provenance, provenance(submission, staged, result["reducer"], ranks) | {"staging": staging})
        write_json(run.result, result)
        LOGGER.info("done: %s", run.path)
    ranks.barrier()
    return result


def stage_files(job: Job, job_folder: Path, ranks: Ranks) -> tuple[dict[str, Staged], list[dict[str, Any]]]:
    """Have every data file on this node; one rank a node does the work, and all ranks fail together.

    Returns:
        The files by name, and what staging each dataset took.
    """
    staged, outcomes = ranks.on_leaders(lambda: _stage(job, job_folder, Leaders(ranks.leader_comm, ranks.world.node)))
    digests = ranks.gather([file.sha256 for file in staged.values()])
    if any(other != digests[0] for other in digests):
        raise DataError(
            "the nodes staged different bytes of the same data",
            "the source changed while the job started: submit it again",
        )
    return staged, [outcome.record() for outcome in outcomes]


def _stage(job: Job, job_folder: Path, leaders: Leaders) -> tuple[dict[str, Staged], list[Outcome]]:
    """Stage the manifest, if there is one, and the files that it does not list; unpack what is an archive."""
    settings = leaders.together(lambda: settings_of(job))
    staged, outcomes = _stage_listed(job, job_folder, settings, leaders)
    for file in (file for file in job.data.files if file.name not in staged):
        outcome = stage_item(item_of(file, job_folder), settings, leaders)
        staged[file.name] = Staged(outcome.files / file.stored_name, outcome.digest, outcome.origin_bytes)
        outcomes.append(outcome)
    for file in (file for file in job.data.files if file.extract is not None):
        packed = staged[file.name]
        path = unpack_archive(packed.path, packed.sha256, file.extract or "", settings, leaders)
        staged[file.name] = Staged(path, packed.sha256, packed.moved_bytes)
    return staged, outcomes


def _stage_listed(job: Job, job_folder: Path, settings: Settings, leaders: Leaders) -> tuple[dict[str, Staged], list[Outcome]]:
    manifest = manifest_of(job, job_folder)
    if manifest is None:
        return {}, []
    listed = leaders.together(lambda: listed_in(manifest, job.data.files, job_folder))
    for file in job.data.files:
        said = listed.get(file.name, ("", None))[1]
        if None not in (said, file.sha256) and said != file.sha256:
            raise IntegrityError(f"{file.name}: train.yaml and {manifest.name} name different sha256", "make the manifest again")
    outcome = stage_manifest(manifest, source_of(job, job_folder), settings, leaders)
    files = {name: Staged(outcome.files / path, sha256 or outcome.digest, 0) for name, (path, sha256) in listed.items()}
    return files, [outcome]


def provenance(submission: dict[str, Any], staged: dict[str, Staged], reducer: str, ranks: Ranks) -> dict[str, Any]:
    """Return what one must know to run the same again."""
    import h5py
    import keras
    import numpy as np
    import tensorflow as tf

    return {
        "submission": submission,
        "image": submission["image"],
        "code_sha256": submission["code_sha256"],
        "data": {name: file.sha256 for name, file in staged.items()},
        "versions": {
            "hpcutils": __version__,
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
            "h5py": h5py.__version__,
            "hdf5": h5py.version.hdf5_version,
            "mpi": _mpi_version(ranks),
            "reducer": reducer,
        },
        "slurm": {
            name.lower(): os.environ.get(name)
            for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_PARTITION", "SLURM_RESTART_COUNT")
        },
    }


def _mpi_version(ranks: Ranks) -> str | None:
    if ranks.comm is None:
        return None
    from mpi4py import MPI

    return str(MPI.Get_library_version().split(",")[0].strip())
