"""`hpcutils submit`: a thin file over `launch`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from hpcutils.cli.options import JOB_FILE, JSON, RUNS, emit, override_options, overrides_of


@click.command()
@JOB_FILE
@override_options()
@click.option("--image", "image_name", metavar="NAME", help="Image to run in: a name that was built, or the path of a SIF.")
@click.option("--dry-run", is_flag=True, help="Print the batch script and the commands; do nothing.")
@click.option("--follow", is_flag=True, help="Wait, stream rank 0's log, exit with the job's verdict.")
@RUNS
@JSON
def submit(
    job_file: Path, image_name: str | None, dry_run: bool, follow: bool, runs: str | None, as_json: bool, **values: Any
) -> None:
    """Submit the job in TRAIN.YAML to Slurm.

    Options win over the file. Stdout gets the result, stderr the progress.
    """
    from hpcutils.cli.prepare import dry_run_text, plan
    from hpcutils.train.entry import run_rank

    planned = plan(job_file, overrides_of(values), image_name, runs)
    if dry_run:
        click.echo(dry_run_text(planned))
        return
    planned.make_data()
    submitted = planned.submit(run_rank)
    run, job_id = submitted.run, submitted.job_id
    click.echo(f"submitted {run.run_id} as Slurm job {job_id}", err=True)
    if follow:
        from hpcutils.launch import monitor

        current = monitor.follow(run, sys.stderr)
        error = monitor.verdict_error(current, run)
        if error is not None:
            raise error
    emit({"run": run.run_id, "job_id": job_id, "path": str(run.path)}, as_json, str(run.path))
