"""Options that several commands share, and how they win over train.yaml."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

JOB_FILE = click.argument("job_file", metavar="TRAIN.YAML", type=click.Path(path_type=Path))
RUNS = click.option("--runs", "runs", metavar="DIR", help="Folder of the run directories [$HPCUTILS_RUNS or ./runs]")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
CUSTOM_OBJECTS = click.option(
    "--custom-objects",
    "references",
    metavar="[NAME=]FILE.PY:NAME",
    multiple=True,
    help="A class or function that the model was saved with; may be given again.",
)
RUN_NAME = click.argument("run_name", metavar="RUN", default="latest")

# Option, where it goes in train.yaml, how it is read, what it says.
OVERRIDES: list[tuple[str, tuple[str, str], Any, str]] = [
    ("--nodes", ("resources", "nodes"), int, "Number of nodes."),
    ("--gpus", ("resources", "gpus"), int, "GPUs of the whole job; must divide by the nodes."),
    ("--gpus-per-node", ("resources", "gpus_per_node"), int, "GPUs of each node, in place of --gpus."),
    ("--time", ("resources", "time"), str, "Time limit, HH:MM:SS or D-HH:MM:SS."),
    ("--partition", ("resources", "partition"), str, "Slurm partition."),
    (
        "--devices",
        ("resources", "devices"),
        click.Choice(["gpu", "simulated"]),
        "GPUs, or logical CPU devices in their place.",
    ),
    (
        "--replication",
        ("resources", "replication"),
        click.Choice(["per_node", "per_gpu"]),
        "One rank a node, or one a GPU.",
    ),
    ("--epochs", ("training", "epochs"), int, "Number of epochs."),
    ("--batch-size", ("training", "batch_size"), int, "Samples of a global batch, over all ranks."),
    ("--seed", ("training", "seed"), int, "Seed of weights and shuffle."),
]


# What means nothing on one machine without Slurm.
SLURM_ONLY = {"--nodes", "--gpus-per-node", "--time", "--partition", "--replication"}


def override_options(leave_out: frozenset[str] | set[str] = frozenset()) -> Callable[[F], F]:
    """Return a decorator that adds an option for each value of train.yaml that the command line can set."""

    def decorate(function: F) -> F:
        for option, location, kind, text in reversed(OVERRIDES):
            if option not in leave_out:
                function = click.option(option, "_".join(location), type=kind, help=text, default=None)(function)
        return function

    return decorate


def overrides_of(values: dict[str, Any]) -> dict[tuple[str | int, ...], tuple[str, Any]]:
    """Return what was given on the command line as locations in train.yaml; `--gpus` replaces the file's per-node number."""
    given: dict[tuple[str | int, ...], tuple[str, Any]] = {}
    for option, location, _, _ in OVERRIDES:
        value = values.get("_".join(location))
        if value is not None:
            given[location] = (option, value)
    # The file's other way to say the same must not contradict the command line.
    if ("resources", "gpus") in given and ("resources", "gpus_per_node") not in given:
        given["resources", "gpus_per_node"] = ("--gpus", None)
    if ("resources", "gpus_per_node") in given and ("resources", "gpus") not in given:
        given["resources", "gpus"] = ("--gpus-per-node", None)
    return given


def emit(value: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a result to stdout: for a program, or for a person."""
    click.echo(json.dumps(value, sort_keys=True) if as_json else text)
