"""`hpcutils cancel`."""

from __future__ import annotations

import click

from hpcutils.cli.options import RUN_NAME, RUNS


@click.command()
@RUN_NAME
@RUNS
def cancel(run_name: str, runs: str | None) -> None:
    """Cancel RUN; one that is over stays as it is."""
    from hpcutils.launch import monitor
    from hpcutils.launch.runs import runs_folder
    from hpcutils.rundir import find_run

    run = find_run(run_name, runs_folder(runs))
    click.echo(monitor.cancel(run))
