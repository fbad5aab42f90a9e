"""`hpcutils summary`."""

from __future__ import annotations

from pathlib import Path

import click

from hpcutils.cli.options import CUSTOM_OBJECTS


@click.command()
@click.argument("source", metavar="TRAIN.YAML|MODEL", type=click.Path(path_type=Path))
@click.option("--width", type=click.IntRange(40), default=100, show_default=True, help="Characters of a line.")
@CUSTOM_OBJECTS
def summary(source: Path, width: int, references: tuple[str, ...]) -> None:
    """Print the layers, shapes and parameters of a job's model or of a saved one (.keras, .h5)."""
    from hpcutils.train.inspect import open_model

    with open_model(source, references) as model:
        from hpcutils.models.summary import print_summary

        print_summary(model, line_length=width, print_fn=click.echo)
