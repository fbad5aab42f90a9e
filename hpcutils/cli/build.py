"""`hpcutils build`: a recipe becomes an image."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hpcutils.image.build import Built
    from hpcutils.image.plan import BuildPlan


@click.command()
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Print what would be made, and the definition; make nothing.")
@click.option("--dockerfile", is_flag=True, help="Print the Dockerfile of the same steps; make nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--force", is_flag=True, help="Make every layer again, though it is there.")
@click.option("--prune", is_flag=True, help="Remove the older images of this recipe afterwards.")
def build(name: str, dry_run: bool, dockerfile: bool, as_json: bool, force: bool, prune: bool) -> None:
    """Build the image of the recipe NAME, or of a recipe's FILE.toml, and print its path.

    Only what changed is made: after a change of hpcutils' own code that takes seconds.
    """
    from hpcutils.image.plan import plan_build

    plan = plan_build(name, force=force)
    if dockerfile:
        click.echo(plan.dockerfile(), nl=False)
    elif dry_run:
        click.echo(json.dumps(plan.as_dict()) if as_json else plan.describe(), nl=as_json)
    else:
        built = _build(plan, prune)
        click.echo(json.dumps(built.as_dict()) if as_json else built.path)


def _build(plan: BuildPlan, prune: bool) -> Built:
    from hpcutils import log
    from hpcutils.image import build

    log.configure()
    built = build.run_build(plan)
    for path in build.prune(plan) if prune else ():
        log.LOGGER.info(f"removed {path}")
    return built
