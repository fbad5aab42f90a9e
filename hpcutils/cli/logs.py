"""`hpcutils logs`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from hpcutils.cli.options import RUN_NAME, RUNS

if TYPE_CHECKING:
    from hpcutils.rundir import RunDirectory


@click.command()
@RUN_NAME
@click.option("--rank", type=click.IntRange(0), default=0, show_default=True, help="Whose log.")
@click.option("--batch", is_flag=True, help="The batch script's own log in place of a rank's.")
@click.option("--follow", is_flag=True, help="Stream rank 0's log until the run is over; exit with its verdict.")
@RUNS
def logs(run_name: str, rank: int, batch: bool, follow: bool, runs: str | None) -> None:
    """Print the newest log of a rank of RUN."""
    from hpcutils.errors import SpecError
    from hpcutils.launch.runs import runs_folder
    from hpcutils.rundir import find_run

    run = find_run(run_name, runs_folder(runs))
    if follow:
        _follow(run)
        return
    log = run.batch_log if batch else run.rank_log(rank)
    if not log.is_file():
        known = ", ".join(path.name for path in sorted(run.current_logs.glob("*.log"))) or "none yet"
        raise SpecError(f"{run.run_id} has no {log.name}", f"there are: {known}")
    click.echo(log.read_text(errors="replace"), nl=False)


def _follow(run: RunDirectory) -> None:
    from hpcutils.launch import monitor

    error = monitor.verdict_error(monitor.follow(run, sys.stdout), run)
    if error is not None:
        raise error
