"""The ranks that run the tests: one alone, or all that srun or mpirun started (see `tests/conftest.py`)."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from hpcutils.data.order import Order, Seat


class Alone:
    """One rank, without MPI."""

    node: Any = None
    nodes = 1

    def seated(self, order: Order) -> Order:
        """Return the order of this rank: nodes own shards where they divide them."""
        return order

    def sum(self, count: int) -> int:
        """Return the sum over ranks."""
        return count


class Together(Alone):
    """All ranks of MPI's world; those of one host share memory."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._world = MPI.COMM_WORLD
        self.node = self._world.Split_type(MPI.COMM_TYPE_SHARED)
        leaders = self._world.allgather(self.node.bcast(self._world.rank))
        self._hosts = sorted(set(leaders))
        self._host = self._hosts.index(leaders[self._world.rank])
        self.nodes = len(self._hosts)

    def seated(self, order: Order) -> Order:
        if order.shuffle and order.shards % self.nodes == 0:
            return replace(order, seat=Seat(self.nodes, self._host, self.node.size, self.node.rank))
        return replace(order, seat=Seat(1, 0, self._world.size, self._world.rank))

    def sum(self, count: int) -> int:
        return int(self._world.allreduce(count))


WORLD = Together() if os.environ.get("HPCUTILS_TESTS_TOGETHER") else Alone()
