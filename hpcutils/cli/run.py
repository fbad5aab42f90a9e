"""`hpcutils run`: train without Slurm and without containers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hpcutils.cli.options import JOB_FILE, JSON, RUNS, SLURM_ONLY, emit, override_options, overrides_of


@click.command()
@JOB_FILE
@click.option("--ranks", type=click.IntRange(1), default=1, show_default=True, help="Local MPI ranks.")
@override_options(leave_out=SLURM_ONLY)
@RUNS
@JSON
def run(job_file: Path, ranks: int, runs: str | None, as_json: bool, **values: Any) -> None:
    """Train the job in TRAIN.YAML on this machine.

    One rank trains in this process; more start under the MPI of this Python environment, or the system's. Each rank drives one
    device unless --gpus says more.
    """
    from hpcutils.cli.prepare import data_argv, make_data
    from hpcutils.launch.local import local_job, run_local
    from hpcutils.launch.runs import runs_folder
    from hpcutils.specs.job import load_job

    folder = job_file.resolve().parent
    job = local_job(load_job(job_file, overrides_of(values)), ranks, values["resources_gpus"])
    argv = data_argv(job, folder)
    if argv is not None:
        make_data(argv, job, folder)
    result = run_local(job, folder, runs_folder(runs), ranks)
    emit(result, as_json, f"{result['path']}")
