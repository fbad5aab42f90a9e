"""`hpcutils plot`."""

from __future__ import annotations

from pathlib import Path

import click

from hpcutils.cli.options import CUSTOM_OBJECTS


@click.command()
@click.argument("source", metavar="TRAIN.YAML|MODEL", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("model.png"),
    show_default=True,
    help="png, svg, pdf or dot.",
)
@click.option("--shapes/--no-shapes", default=True, show_default=True, help="Write the shapes of inputs and outputs.")
@click.option("--expand-nested", is_flag=True, help="Draw the layers of models inside the model.")
@click.option(
    "--rankdir", type=click.Choice(["TB", "LR", "BT", "RL"]), default="TB", show_default=True, help="Direction of the flow."
)
@click.option("--dpi", type=click.IntRange(20, 600), default=96, show_default=True, help="Dots per inch.")
@CUSTOM_OBJECTS
def plot(
    source: Path, output: Path, shapes: bool, expand_nested: bool, rankdir: str, dpi: int, references: tuple[str, ...]
) -> None:
    """Draw a job's model or a saved one (.keras, .h5)."""
    from hpcutils.train.inspect import open_model

    with open_model(source, references) as model:
        from hpcutils.models.plot import plot_model

        plot_model(model, str(output), show_shapes=shapes, expand_nested=expand_nested, rankdir=rankdir, dpi=dpi)
    click.echo(str(output))
