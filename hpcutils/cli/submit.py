"""`hpcutils submit`: a thin file over `launch`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpcutils.cli.options import JOB_FILE, JSON, RUNS, emit, override_options, overrides_of

if TYPE_CHECKING:
    from hpcutils.rundir import RunDirectory


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
    from hpcutils.cli.prepare import plan
    from hpcutils.train.entry import run_rank

    planned = plan(job_file, overrides_of(values), image_name, runs)
    if dry_run:
        emit(planned.as_dict(), as_json, planned.describe())
        return
    planned.make_data()
    submitted = planned.submit(run_rank)
    click.echo(f"submitted {submitted.run.run_id} as Slurm job {submitted.job_id}", err=True)
    known = {"run": submitted.run.run_id, "job_id": submitted.job_id, "path": str(submitted.run.path)}
    if follow:
        known |= _followed(submitted.run, known, as_json)
    emit(known, as_json, str(submitted.run.path))


def _followed(run: RunDirectory, known: dict[str, Any], as_json: bool) -> dict[str, Any]:
    """Wait for the verdict and return it; one that is an error is printed for programs before it is raised."""
    from hpcutils.errors import HpcutilsError
    from hpcutils.launch import monitor

    try:
        current = monitor.follow(run, sys.stderr)
    except HpcutilsError as exc:
        # Not the job's end: Ctrl-C, or a Slurm that is away.
        if as_json:
            emit({**known, "state": "UNKNOWN", "exit_code": None, "error": exc.message}, as_json, "")
        raise
    verdict = {"state": current.state, "exit_code": current.exit_code}
    error = monitor.verdict_error(current, run)
    if error is None:
        return verdict
    if as_json:
        emit({**known, **verdict, "error": error.message}, as_json, "")
    raise error
