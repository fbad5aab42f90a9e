"""`hpcutils status`."""

from __future__ import annotations

from dataclasses import asdict

import click

from hpcutils.cli.options import JSON, RUN_NAME, RUNS, emit


@click.command()
@RUN_NAME
@RUNS
@JSON
def status(run_name: str, runs: str | None, as_json: bool) -> None:
    """Say where RUN stands (an id, its unique beginning, a folder, or `latest`)."""
    from hpcutils.launch import monitor
    from hpcutils.launch.runs import runs_folder
    from hpcutils.rundir import find_run, read_json

    run = find_run(run_name, runs_folder(runs))
    current = monitor.status(run)
    result = read_json(run.result)
    lines = [f"{run.run_id}  {current.state}" + (f"  job {current.job_id}" if current.job_id else "")]
    lines += [f"  {current.reason}"] if current.reason else []
    lines += (
        [f"  accuracy {result['accuracy']:.4f}  coverage {result['coverage']}"] if result and result["accuracy"] is not None else []
    )
    emit({**asdict(current), "path": str(run.path), "result": result}, as_json, "\n".join(lines))
