"""`hpcutils logs`."""

from __future__ import annotations

import click

from hpcutils.cli.options import RUN_NAME, RUNS


@click.command()
@RUN_NAME
@click.option("--rank", type=click.IntRange(0), default=0, show_default=True, help="Whose log.")
@click.option("--batch", is_flag=True, help="The batch script's own log in place of a rank's.")
@RUNS
def logs(run_name: str, rank: int, batch: bool, runs: str | None) -> None:
    """Print the newest log of a rank of RUN."""
    from hpcutils.errors import SpecError
    from hpcutils.launch.runs import runs_folder
    from hpcutils.rundir import find_run

    run = find_run(run_name, runs_folder(runs))
    log = run.batch_log if batch else run.rank_log(rank)
    if not log.is_file():
        known = ", ".join(path.name for path in sorted(run.current_logs.glob("*.log"))) or "none yet"
        raise SpecError(f"{run.run_id} has no {log.name}", f"there are: {known}")
    click.echo(log.read_text(errors="replace"), nl=False)
