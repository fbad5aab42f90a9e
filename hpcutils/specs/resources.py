"""What a job asks Slurm for: the section `resources`, and the times and numbers in it."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from hpcutils.errors import RequestError
from hpcutils.specs.fields import Model

# As `man sbatch` has them: with days the first number after the dash is hours, without days the last one is seconds.
TIME_PATTERN = re.compile(
    r"(?P<days>\d{1,4})-(?P<dh>\d{1,2})(?::(?P<dm>\d{1,2})(?::(?P<ds>\d{1,2}))?)?"
    r"|(?:(?P<h>\d{1,5}):(?P<m>\d{1,2})|(?P<minutes>\d{1,5})):(?P<s>\d{2})",
    re.ASCII,
)


class Resources(Model):
    """What the job asks Slurm for."""

    nodes: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[int, Field(ge=1)] | None = None
    gpus_per_node: Annotated[int, Field(ge=1)] | None = None
    cpus_per_task: Annotated[int, Field(ge=1)] = 1
    time: str = "01:00:00"
    partition: str | None = None
    devices: Literal["gpu", "simulated"] = "gpu"
    replication: Literal["per_node", "per_gpu"] = "per_node"

    @field_validator("time")
    @classmethod
    def _time(cls, value: str) -> str:
        try:
            enough = parse_time_s(value) >= 60
        except ValueError:
            enough = False
        if not enough:
            raise ValueError(f"a time of at least a minute as HH:MM:SS or D-HH:MM:SS was expected, got {value!r}")
        return value


def parse_time_s(text: str) -> int:
    """Return the seconds in a Slurm time: `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM` or `D-HH:MM:SS`.

    Raises:
        ValueError: It is none, or has 60 seconds or minutes or 24 hours where a larger unit stands before.
    """
    match = TIME_PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(text)
    part = {name: int(digits or 0) for name, digits in match.groupdict().items()}
    hours, minutes, seconds = part["dh"] or part["h"], part["dm"] or part["m"], part["ds"] or part["s"]
    if part["dh"] > 23 or minutes > 59 or seconds > 59:
        raise ValueError(text)
    return ((part["days"] * 24 + hours) * 60 + minutes + part["minutes"]) * 60 + seconds


def layout_problem(nodes: int, total: int | None, each: int | None, dash: str = "") -> tuple[str, str] | None:
    """Return what is wrong with numbers of nodes and GPUs, and what to do about it; `None` where they fit.

    Args:
        nodes: Number of nodes.
        total: GPUs of the whole job.
        each: GPUs of each node.
        dash: What stands before a name: `--` for options.
    """
    names = {name: f"{dash}{name.replace('_', '-') if dash else name}" for name in ("nodes", "gpus", "gpus_per_node")}
    if total is not None and total % nodes:
        lower, upper = total - total % nodes, total + nodes - total % nodes
        near = f"{lower} or {upper}" if lower else str(upper)
        return (
            f"{names['gpus']} {total} does not divide by {names['nodes']} {nodes}: every node gets the same number",
            f"ask for {near} GPUs, or say {names['gpus_per_node']}",
        )
    if total is not None and each is not None and total != each * nodes:
        on_nodes = f"{names['gpus_per_node']} {each} on {nodes} nodes ({each * nodes})"
        return f"{names['gpus']} {total} (the job's total) contradicts {on_nodes}", "give one of the two"
    return None


def gpus_per_node(resources: Resources) -> int:
    """Return the GPUs of each node.

    Raises:
        RequestError: The job's total does not divide by the nodes, or total and per-node number contradict each other.
    """
    total, each, nodes = resources.gpus, resources.gpus_per_node, resources.nodes
    problem = layout_problem(nodes, total, each, "--")
    if problem is not None:
        raise RequestError(*problem)
    if total is not None:
        return total // nodes
    return each if each is not None else 1
