"""Making a run: its directory first, then Slurm; a refusal leaves nothing behind."""

from __future__ import annotations

import getpass
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcutils import __version__, fs
from hpcutils.launch import executor
from hpcutils.launch.request import Layout, Request
from hpcutils.launch.snapshot import snapshot
from hpcutils.rundir import RunDirectory, write_json
from hpcutils.specs.job import Job

DEFAULT_RUNS = "runs"


def runs_folder(given: str | None = None) -> Path:
    """Return the folder of all runs: `--runs`, `$HPCUTILS_RUNS`, or `runs` here. It must be on the shared file system."""
    return Path(given or os.environ.get("HPCUTILS_RUNS") or DEFAULT_RUNS).resolve()


def prepare(run: RunDirectory, job: Job, job_folder: Path, layout: Layout, image: dict[str, Any] | None) -> None:
    """Fill a new run directory with all that the ranks will read.

    Args:
        run: The directory to make.
        job: The resolved job.
        job_folder: Folder of `train.yaml`: its code is copied, its data stays where it is.
        layout: Ranks and devices.
        image: What is known of the image (path, sha256, digest), or `None`.
    """
    run.path.mkdir(parents=True)
    run.checkpoints.mkdir()
    run.logs.mkdir()
    code_digest = snapshot(job_folder, run.code)
    fs.write_text(run.job, job.model_dump_json(indent=2) + "\n")
    write_json(
        run.submission,
        {
            "run": run.run_id,
            "job_folder": str(job_folder),
            "submitted_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "user": getpass.getuser(),
            "host": platform.node(),
            "hpcutils": __version__,
            "code_sha256": code_digest,
            "image": image,
            "nodes": layout.nodes,
            "ranks_per_node": layout.ranks_per_node,
            "devices_per_rank": layout.devices_per_rank,
        },
    )


def submit_run(request: Request, job_folder: Path, image: dict[str, Any] | None, task: Callable[[str], object]) -> str:
    """Make the run directory, submit, and return Slurm's job id; a refused run leaves no directory."""
    try:
        prepare(request.run, request.job, job_folder, request.layout, image)
        job_id = executor.submit(request, task)
    except BaseException:
        fs.remove(request.run.path)
        raise
    write_json(request.run.path / "slurm.json", {"job_id": job_id})
    return job_id
