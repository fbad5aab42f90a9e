"""How the leaders of the nodes, one rank each, talk while they stage. They never spin: who waits sleeps between looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from hpcutils.errors import HpcutilsError

Result = TypeVar("Result")
# A look lets MPI move what it can. The first ones follow each other at once: most waits are short.
EAGER_LOOKS = 200
SHORT_NAP_S, LONG_NAP_S = 0.00005, 0.0005


class Leaders:
    """The leaders of this job's nodes.

    Args:
        comm: mpi4py communicator with one rank a node, used by nothing else meanwhile; `None` for one node.
        node: This node's name.
    """

    def __init__(self, comm: Any = None, node: str = "this node") -> None:
        self.comm, self.node = comm, node
        self.rank = 0 if comm is None else int(comm.rank)
        self.size = 1 if comm is None else int(comm.size)

    def gather(self, value: Result) -> list[Result]:
        """Return every leader's `value`, on every leader."""
        if self.comm is None:
            return [value]
        # The pickled exchange blocks, and would spin: all are there before it begins.
        run([wait(self.comm.Ibarrier())])
        return list(self.comm.allgather(value))

    def together(self, work: Callable[[], Result]) -> Result:
        """Do `work` on every leader; where it fails on one, every leader raises that error."""
        result, error = None, None
        try:
            result = work()
        except HpcutilsError as exc:
            error = exc
        self.raise_any(error)
        return result  # type: ignore[return-value]

    def raise_any(self, error: HpcutilsError | None) -> None:
        """Raise the error of the first leader that has one, on all of them."""
        self.share(error, None)

    def share(self, error: HpcutilsError | None, value: Result) -> list[Result]:
        """Return every leader's `value`, on every leader; or raise the error of the first one that has one."""
        told = self.gather((error, value))
        for known, _ in told:
            if known is not None:
                raise known
        return [given for _, given in told]


def wait(*requests: Any) -> Iterator[None]:
    """Yield until all `requests` are done."""
    left: Sequence[Any] = requests
    while left := [request for request in left if not request.Test()]:
        yield


def run(waits: Sequence[Iterator[None]]) -> None:
    """Go through several waits at once, to the end of all."""
    looks = 0
    while waits := [each for each in waits if next(each, _END) is not _END]:
        looks += 1
        if looks > EAGER_LOOKS:
            time.sleep(SHORT_NAP_S if looks < 10 * EAGER_LOOKS else LONG_NAP_S)


_END = object()
