"""One rank's whole life, top to bottom: stage, open, build, train, record."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

from hpcutils.errors import WorldError
from hpcutils.log import LOGGER
from hpcutils.rundir import RunDirectory, read_json, write_json
from hpcutils.specs.job import read_job
from hpcutils.train import devices
from hpcutils.train.preflight import preflight
from hpcutils.train.provenance import Provenance
from hpcutils.train.ranks import Ranks
from hpcutils.train.stager import stage_files
from hpcutils.world import World


def train(run: RunDirectory, world: World) -> dict[str, Any]:
    """Train the run's job as one of its ranks; returns what rank 0 writes to `result.json`."""
    started = time.perf_counter()
    job, submission = read_job(run.job.read_text()), read_json(run.submission)
    record = Provenance(run, world, submission)
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
    record.add_data(arrivals.staged, arrivals.records)
    devices.prepare(job)
    names = ranks.together(lambda: devices.configure(job, world, submission["devices_per_rank"]))

    from hpcutils.train import session

    record.add_versions(ranks)
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
    # Once more: of files that came while training went on, more is known now.
    record.add_data(arrivals.staged, arrivals.records)
    record.complete(result["reducer"])
    if world.rank == 0:
        write_json(run.result, result)
        LOGGER.info("done: %s", run.path)
    ranks.barrier()
    return result
