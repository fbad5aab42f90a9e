"""How ranks talk: MPI where there are several, nothing where there is one. Training starts here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hpcutils.data.order import Certificate
from hpcutils.data.shared import wait_for_all
from hpcutils.errors import HpcutilsError, MissingPartError
from hpcutils.world import World, check_against_mpi

Result = TypeVar("Result")


class Ranks:
    """The ranks of this job.

    Args:
        world: This rank's place, from the launcher.

    Raises:
        WorldError: MPI sees another world than the launcher.
        MissingPartError: Several ranks, and no MPI to connect them.

    Attributes:
        comm: mpi4py communicator of all ranks, or `None` in a world of one.
        node_comm: That of the ranks on this node, or `None`.
        leader_comm: That of one rank a node, on those ranks; else `None`.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.comm: Any = None
        self.node_comm: Any = None
        self.leader_comm: Any = None
        if world.world_size > 1:
            self._connect()

    def _connect(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as exc:
            raise MissingPartError(
                f"{self.world.world_size} ranks need MPI, and it cannot be loaded: {exc}",
                "install 'hpcutils[train]', or the system's openmpi-bin",
            ) from exc
        check_against_mpi(self.world, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
        # Own communicators: Horovod and user code may use the world's, and messages must not cross.
        self.comm = MPI.COMM_WORLD.Dup()
        self.node_comm = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        split = self.comm.Split(0 if self.world.is_leader else MPI.UNDEFINED)
        self.leader_comm = split if self.world.is_leader else None

    def gather(self, value: Result) -> list[Result]:
        """Return every rank's `value`, on every rank."""
        return self.comm.allgather(value) if self.comm is not None else [value]

    def broadcast(self, value: Result) -> Result:
        """Return rank 0's `value`."""
        return self.comm.bcast(value) if self.comm is not None else value

    def sum(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum over ranks, elementwise."""
        if self.comm is None:
            return array
        total = np.empty_like(array)
        self.comm.Allreduce(np.ascontiguousarray(array), total)
        return total

    def join(self, own: Certificate) -> Certificate:
        """Return the certificate of all ranks' samples together."""
        return own.over(self.comm) if self.comm is not None else own

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.comm is not None:
            self.comm.Barrier()

    def together(self, work: Callable[[], Result]) -> Result:
        """Run `work` on every rank; where it fails on one, every rank raises that error, and none waits for the lost one."""
        result, error = None, None
        try:
            result = work()
        except HpcutilsError as exc:
            error = exc
        self.sleep_until_all_are_here()
        errors = [known for known in self.gather(error) if known is not None]
        if errors:
            raise errors[0]
        return result  # type: ignore[return-value]

    def sleep_until_all_are_here(self) -> None:
        """Wait for all ranks without spinning: what one rank a node does for minutes must not cost the others' cores."""
        if self.comm is not None:
            wait_for_all(self.comm)

    def on_leaders(self, work: Callable[[], Result]) -> Result:
        """Run `work` on one rank of each node and return its result to the node's other ranks."""
        result = self.together(lambda: work() if self.world.is_leader else None)
        return self.node_comm.bcast(result) if self.node_comm is not None else result  # type: ignore[return-value]
