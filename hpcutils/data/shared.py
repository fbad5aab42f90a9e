"""Memory that the ranks of a node share: one MPI window, or plain memory where a rank is alone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hpcutils.data.room import usable_bytes

ALIGNMENT = 64
# Between two looks at whether all ranks have come.
NAP_S = 0.0005


def free_memory_bytes() -> int:
    """Return what a window could take: memory that the ranks may use, and no more than /dev/shm has room for."""
    usable = usable_bytes()
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if usable is None else usable
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    return min(available, shm.f_bavail * shm.f_frsize) if shm is not None else available


def threads_may_call_mpi() -> bool:
    """Return whether MPI was started so that any thread may call it, at any time."""
    from mpi4py import MPI

    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


def wait_for_all(ranks: Any) -> None:
    """Wait until all ranks of an mpi4py communicator are here, asleep: a blocking barrier of Open MPI keeps a core busy."""
    request = ranks.Ibarrier()
    while not request.Test():
        time.sleep(NAP_S)


class SharedMemory:
    """Zeroed bytes that every rank of a node sees, handed out in pieces.

    Args:
        size_bytes: How many, for all pieces together, each rounded up to `ALIGNMENT`.
        node: mpi4py communicator of the ranks on this node, or `None` for a rank alone. All its ranks make it together.
    """

    def __init__(self, size_bytes: int, node: Any = None) -> None:
        self._window: Any = None
        self._used = 0
        if node is None or node.size == 1:
            self._bytes: NDArray[np.uint8] | None = np.zeros(size_bytes, np.uint8)
            return
        from mpi4py import MPI

        self._window = MPI.Win.Allocate_shared(size_bytes if node.rank == 0 else 0, 1, comm=node)
        memory, _ = self._window.Shared_query(0)
        self._bytes = np.frombuffer(memory, np.uint8)
        # One long epoch of passive access: what `sync` needs, and no call of it waits for another rank.
        self._window.Lock_all(MPI.MODE_NOCHECK)

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return the next piece as an array; all ranks ask for the same pieces in the same order."""
        assert self._bytes is not None
        size = rounded(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)
        piece = self._bytes[self._used : self._used + size]
        self._used += size
        return np.ndarray(shape, dtype, buffer=piece.data)

    def sync(self) -> None:
        """Put what was written before ahead of what is read or written after, as the other ranks see it."""
        if self._window is not None:
            self._window.Sync()

    def close(self) -> None:
        """Give the memory back; every rank of the node calls it, once no array of it is in use."""
        self._bytes = None
        if self._window is not None:
            self._window.Unlock_all()
            self._window.Free()
            self._window = None


def rounded(size_bytes: int) -> int:
    """Return the bytes that a piece takes."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
