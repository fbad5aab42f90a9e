"""`hpcutils build`: a recipe becomes an image."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from hpcutils.image.finished import Built
    from hpcutils.image.plan import BuildPlan


@click.command()
@click.argument("name")
@click.option(
    "--format",
    "image_format",
    type=click.Choice(["apptainer", "docker"]),
    default="apptainer",
    show_default=True,
    help="A SIF, or an OCI archive for Docker, Podman and Pyxis.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be made, and the whole definition; make nothing.")
@click.option(
    "--builder", metavar="NAME", help="apptainer, singularity, docker, buildah or podman; the first that works when left out."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--force", is_flag=True, help="Make every layer again, though it is there.")
@click.option(
    "--relock",
    is_flag=True,
    envvar="HPCUTILS_RELOCK",
    help="Where the mirror no longer has a locked Debian package: take what it has, for this machine alone, and say so.",
)
@click.option("--prune", is_flag=True, help="Remove all older images of this recipe afterwards, but those of jobs in the queue.")
def build(
    name: str,
    image_format: Literal["apptainer", "docker"],
    dry_run: bool,
    builder: str | None,
    as_json: bool,
    force: bool,
    relock: bool,
    prune: bool,
) -> None:
    """Build the image of the recipe NAME, or of a recipe's FILE.toml, and print its path.

    Only what changed is made: after a change of hpcutils' own code that takes seconds.
    """
    from hpcutils.image.plan import plan_build

    plan = plan_build(name, format=image_format, force=force)
    if dry_run:
        click.echo(json.dumps(plan.as_dict()) if as_json else plan.describe(), nl=as_json)
    else:
        built = _build(plan, builder, relock, prune)
        click.echo(json.dumps(built.as_dict()) if as_json else built.path)


def _build(plan: BuildPlan, builder: str | None, relock: bool, prune: bool) -> Built:
    from hpcutils import log
    from hpcutils.image.finished import finished, up_to_date

    log.configure()
    known = finished(plan, relock=relock)
    built, carried_out = (up_to_date(known), known) if known is not None else _made(plan, builder, relock)
    if prune:
        from hpcutils.image.retention import prune as remove_older

        remove_older(carried_out)
    return built


def _made(plan: BuildPlan, builder: str | None, relock: bool) -> tuple[Built, BuildPlan]:
    # All that builds: of no use, and not imported, where nothing is to be done.
    from hpcutils.image.build import run_build

    return run_build(plan, builder, relock=relock)
