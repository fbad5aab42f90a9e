"""One rank's whole life, top to bottom: stage, open, build, train, record."""

from __future__ import annotations

import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

from hpcutils import __version__
from hpcutils.errors import WorldError
from hpcutils.log import LOGGER
from hpcutils.rundir import RunDirectory, read_json, write_json
from hpcutils.specs.job import read_job
from hpcutils.staging.stage import Staged
from hpcutils.train import devices
from hpcutils.train.preflight import preflight
from hpcutils.train.ranks import Ranks
from hpcutils.train.stager import stage_files
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
    arrivals = stage_files(job, Path(submission["job_folder"]), ranks)
    devices.prepare(job)
    names = ranks.together(lambda: devices.configure(job, world, submission["devices_per_rank"]))

    from hpcutils.train import session

    outcome = session.run(job, run, ranks, arrivals, names)
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
        staging = {"staging": arrivals.records}
        write_json(run.provenance, provenance(submission, arrivals.staged, result["reducer"], ranks) | staging)
        write_json(run.result, result)
        LOGGER.info("done: %s", run.path)
    ranks.barrier()
    return result


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
