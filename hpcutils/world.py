"""Who am I among the ranks: found once, checked from every side, passed on as a value.

Slurm, PMIx and Open MPI each tell a process its rank and the size of the world. They must agree: a job whose launcher and MPI
do not fit starts N worlds of one rank each, and would train N models in silence (seen with Open MPI 5 under plain `srun`).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from hpcutils.errors import WorldError

LAUNCH_HINT = "launch with 'srun --mpi=pmix', and check that the image's Open MPI was built with PMIx"

# What each launcher calls (rank, world size, rank on the node). PMIx itself gives a process only its rank.
SOURCES = {
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "PMIx": ("PMIX_RANK", "", ""),
}

# One of these tells MPI how to reach the other ranks.
MPI_WIRES = ("PMIX_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")


@dataclass(frozen=True)
class World:
    """One rank's place: task = one Slurm process = one rank.

    Args:
        rank: 0 to `world_size - 1`.
        world_size: Number of ranks of the job.
        local_rank: Number among the ranks of the node.
        local_size: Ranks on this node.
        node_rank: Number of the node.
        nodes: Number of nodes.
        node: The node's name.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node_rank: int = 0
    nodes: int = 1
    node: str = "localhost"

    @property
    def is_leader(self) -> bool:
        """Whether this rank does its node's share of node-wide work."""
        return self.local_rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank}/{self.world_size} {self.node}"


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise WorldError(f"{name}={text!r} is not a number", LAUNCH_HINT)
    return int(text)


def _agreed(environ: Mapping[str, str], column: int, what: str) -> int | None:
    """Return what all launchers that speak say about one fact; `None` if none does."""
    said = {names[column]: _number(environ, names[column]) for names in SOURCES.values() if names[column]}
    said = {name: number for name, number in said.items() if number is not None}
    if len(set(said.values())) > 1:
        claims = ", ".join(f"{name}={number}" for name, number in said.items())
        raise WorldError(f"the launchers disagree about the {what}: {claims}", LAUNCH_HINT)
    return next(iter(said.values()), None)


def world_from_environment(environ: Mapping[str, str] | None = None) -> World:
    """Read the world from the launcher's variables.

    In a Slurm batch script's own shell (not started by srun) there is a task count and no honest rank: an error, never rank 0.

    Raises:
        WorldError: The launchers disagree, or there is more than one task and no rank.
    """
    environ = os.environ if environ is None else environ
    in_step = "SLURM_STEP_ID" in environ
    if not in_step:
        # sbatch exports SLURM_PROCID=0 to the batch shell: a rank only inside a step started by srun.
        environ = {name: value for name, value in environ.items() if name not in ("SLURM_PROCID", "SLURM_LOCALID")}
        if "OMPI_COMM_WORLD_SIZE" in environ:
            environ.pop("SLURM_NTASKS", None)
    rank = _agreed(environ, 0, "rank")
    size = _agreed(environ, 1, "size of the world") or 1
    if rank is None and size > 1:
        raise WorldError(f"Slurm counts {size} tasks, but this process was given no rank", LAUNCH_HINT)
    if in_step and size > 1 and not any(name in environ for name in MPI_WIRES):
        # Open MPI 4 would end the process in MPI_Init without a word of why; Open MPI 5 would make it a world of one.
        raise WorldError(f"Slurm started rank {rank} of {size} without PMIx: MPI cannot connect it to the others", LAUNCH_HINT)
    if rank is not None and rank >= size:
        raise WorldError(f"rank {rank} does not exist in a world of {size}", LAUNCH_HINT)
    local_rank = _agreed(environ, 2, "rank on the node") or 0
    node = environ.get("SLURMD_NODENAME") if in_step else None
    return World(
        rank=rank or 0,
        world_size=size,
        local_rank=local_rank,
        local_size=_local_size(environ, size),
        node_rank=(_number(environ, "SLURM_NODEID") or 0) if in_step else 0,
        nodes=(_number(environ, "SLURM_STEP_NUM_NODES") or _number(environ, "SLURM_NNODES") or 1) if in_step else 1,
        node=node or socket.gethostname(),
    )


def _local_size(environ: Mapping[str, str], world_size: int) -> int:
    """Return the ranks on this node; srun writes them as `4(x2)` or `4,3`, a figure a node, of which the node's own counts."""
    local = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    if local is not None:
        return local
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "") if "SLURM_STEP_ID" in environ else ""
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    node_rank = _number(environ, "SLURM_NODEID") or 0
    return counts[node_rank] if node_rank < len(counts) else world_size


def check_against_mpi(world: World, mpi_rank: int, mpi_size: int) -> None:
    """Hold the launcher's word against MPI's own.

    Raises:
        WorldError: MPI sees another world, most often N singletons because the launch did not carry PMIx into the container.
    """
    if (mpi_rank, mpi_size) == (world.rank, world.world_size):
        return
    raise WorldError(
        f"the launcher started rank {world.rank} of {world.world_size}, but MPI says rank {mpi_rank} of {mpi_size}",
        LAUNCH_HINT,
    )
