"""Windows of the order, decoded in the background into memory that the ranks of a node share: each chunk once an epoch.

The ranks of a node take turns in the schedule (`hpcutils.data.schedule`): each decodes its windows into their slots and says so in
shared memory; every rank takes its samples from the slots and says there which steps it has read. Nobody waits in MPI: ranks look
at each other's counters every half millisecond, since waiting inside of MPI keeps a core busy that the step could use.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcutils.data.order import Cut, Order
from hpcutils.data.schedule import Task, epoch_order, plan_memory, schedule
from hpcutils.data.segments import Matrix
from hpcutils.data.segments import layout_of as layout_of
from hpcutils.data.shards import Window
from hpcutils.data.shared import SharedMemory, rounded, threads_may_call_mpi, wait_for_all
from hpcutils.errors import DataError

POLL_S = 0.0005
MAX_THREADS = 8
# A rank that lost its partner waits so long before it says so: the partner's own words tell more.
PATIENCE_S = 5.0
# More windows than a shard of any dataset has: tells windows of different epochs apart.
MAX_WINDOWS = 1 << 40


def window_bytes(order: Order, row_bytes: int) -> int:
    """Return the bytes of a node's memory that windows of rows of `row_bytes` take."""
    plan = plan_memory(order)
    return rounded(plan.slots * plan.slot_rows * row_bytes) + rounded(8 * plan.slots)


class WindowReader:
    """Rows of several datasets of the same length, read in the order of an epoch.

    Args:
        matrices: The datasets, whose common borders are those of the order's layout (`layout_of`). No normalizers.
        order: This rank's.
        node: mpi4py communicator of the ranks of this node, or `None` for a rank alone.
        epochs: Number of all epochs: nothing is decoded for one that does not come. `None` is for ever.
        in_background: Decode while steps run; `None` does where MPI allows it.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        order: Order,
        node: Any = None,
        epochs: int | None = None,
        in_background: bool | None = None,
    ) -> None:
        self.matrices, self.order, self.epochs, self._node = list(matrices), order, epochs, node
        self.plan = plan_memory(order)
        self._rank: int = node.rank if node is not None else 0
        self._ranks: int = node.size if node is not None else 1
        alone = self._ranks == 1
        self.in_background = (alone or threads_may_call_mpi()) if in_background is None else in_background
        self._share_memory()
        self._share_turns()
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        # By epoch and dataset.
        self._counted: Counter[tuple[int, int]] = Counter()
        self._next: tuple[int, int] | None = None
        self._last_rows: list[NDArray[Any]] = []

    def begin(self, epoch: int, first_step: int = 0) -> None:
        """Get ready for an epoch from a step on; all ranks of the node call it. Nothing to do where it follows what was read."""
        if self._next == (epoch, first_step):
            return
        self._stop()
        self._barrier()
        if self._rank == 0:
            self._ready[:], self._failed[:] = 0, 0
            self._done[:] = epoch * self.order.steps + first_step
        self._barrier()
        self._next = (epoch, first_step)
        for number in range(len(self.matrices)):
            self._counted.pop((epoch, number), None)
        self._schedule = schedule(self.order, self.plan.slots, epoch, first_step, self.epochs)
        # Of each shard, the windows that were given a slot last: (3, live + 1, shards) name, slot, task.
        self._assigned = np.full((3, self.plan.live + 1, self.order.shards), -1, np.int64)
        tasks = schedule(self.order, self.plan.slots, epoch, first_step, self.epochs)
        self._own = (task for task in tasks if task.number % self._all_turns in self._turns)
        self._take = threading.Lock()
        self._held: Task | None = None
        if self.in_background:
            self._start_threads()

    def read(self, step: int, cut: Cut) -> list[NDArray[Any]]:
        """Return the rows of a cut, `(local_rows, ...)` of each dataset. Steps come in order, epoch after epoch."""
        assert self._next is not None and self._next[1] == step, f"step {step} was read out of turn"
        epoch = self._next[0]
        if not self.in_background:
            self._decode_before(epoch * self.order.steps + step + 1)
        read = self._gathered(cut, epoch, step) if cut.from_node else self._padding(cut)
        self._next = (epoch, step + 1) if step + 1 < self.order.steps else (epoch + 1, 0)
        self._memory.sync()
        self._done[self._rank] = epoch * self.order.steps + step + 1
        return read

    def chunks_read(self, epoch: int, dataset: int = 0) -> int:
        """Return how many chunks of a dataset this rank fetched for an epoch."""
        return self._counted[epoch, dataset]

    def close(self) -> None:
        """Let go of memory and files; all ranks of the node call it."""
        self._stop()
        self._barrier()
        self._rows.clear()
        self._last_rows = []
        del self._ready, self._done, self._failed
        self._memory.close()
        for matrix in self.matrices:
            matrix.close()

    def _share_memory(self) -> None:
        rows = self.plan.slots * self.plan.slot_rows
        size = sum(rounded(rows * matrix.row_bytes) for matrix in self.matrices)
        self._memory = SharedMemory(size + rounded(8 * self.plan.slots) + rounded(8 * self._ranks) + rounded(8), self._node)
        # One more than the number of the task whose window is in a slot; steps read, by rank; who failed, counted from 1.
        self._ready = self._memory.array((self.plan.slots,), np.int64)
        self._done = self._memory.array((self._ranks,), np.int64)
        self._failed = self._memory.array((1,), np.int64)
        # (slots * slot_rows, *row shape) for each dataset.
        self._rows: list[NDArray[Any]] = [self._memory.array((rows, *matrix.shape[1:]), matrix.dtype) for matrix in self.matrices]

    def _share_turns(self) -> None:
        """Find this rank's turns in the schedule: one for each of its threads."""
        cores = frozenset(os.sched_getaffinity(0))
        everyone = self._node.allgather(cores) if self._node is not None else [cores]
        # Ranks that are bound to cores of their own use those; others divide what they share.
        shares = [max(1, min(len(own) // everyone.count(own), MAX_THREADS)) if self.in_background else 1 for own in everyone]
        first = sum(shares[: self._rank])
        self._all_turns, self._turns = sum(shares), range(first, first + shares[self._rank])

    def _start_threads(self) -> None:
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(self._stopped,), name="hpcutils-windows", daemon=True) for _ in self._turns
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, stopped: threading.Event) -> None:
        """Decode window after window, each as soon as its slot is free (in a thread)."""
        try:
            while not stopped.is_set():
                with self._take:
                    task = next(self._own, None)
                if task is None:
                    return
                while not self._is_free(task):
                    if stopped.wait(POLL_S):
                        return
                self._decode(task)
        except BaseException as exc:  # noqa: BLE001 - the end of a thread: the step that waits for the window raises it
            self._error = exc
            self._failed[0] = self._rank + 1

    def _decode_before(self, step: int) -> None:
        """Decode, in this thread, this rank's windows that steps before `step` may need on any rank of the node.

        Also those that this rank itself does not need: the others wait for them now, and this rank is on its way to a step in
        which it will wait for the others.
        """
        while True:
            self._held = self._held or next(self._own, None)
            if self._held is None or self._held.before >= step:
                return
            while not self._is_free(self._held):
                self._look_for_failures(step)
                time.sleep(POLL_S)
            self._decode(self._held)
            self._held = None

    def _is_free(self, task: Task) -> bool:
        free = int(self._done.min()) >= task.after
        self._memory.sync()
        return free

    def _decode(self, task: Task) -> None:
        """Decode the chunks of a window into its slot and say that it is there."""
        order = self.order
        window = epoch_order(order.layout, order.seed, task.epoch, order.shuffle).window(task.shard, task.window)
        self._fill(task, window, (window.offsets + task.slot * self.plan.slot_rows).tolist())
        self._memory.sync()
        self._ready[task.slot] = task.number + 1

    def _fill(self, task: Task, window: Window, borders: list[int]) -> None:
        """Decode each chunk of a window to the rows between its borders."""
        for start, low, high in zip(window.starts.tolist(), borders, borders[1:], strict=False):
            chunks = [matrix.read_into(start, rows[low:high]) for matrix, rows in zip(self.matrices, self._rows, strict=True)]
            with self._take:
                for number, count in enumerate(chunks):
                    self._counted[task.epoch, number] += count

    def _gathered(self, cut: Cut, epoch: int, step: int) -> list[NDArray[Any]]:
        """Wait until all windows of a cut are in their slots and copy its rows from there."""
        ring = cut.windows % len(self._assigned[0])
        while not np.array_equal(self._assigned[0, ring, cut.shards], cut.windows + epoch * MAX_WINDOWS):
            self._assign(next(self._schedule))
        slots, numbers = self._assigned[1:, ring, cut.shards]
        while not bool((self._ready[slots] == numbers).all()):
            self._look_for_failures(step)
            time.sleep(POLL_S)
        self._memory.sync()
        places = slots * self.plan.slot_rows + cut.places
        read = [rows[places] for rows in self._rows]
        self._last_rows = [rows[-1:].copy() for rows in read]
        return read

    def _assign(self, task: Task) -> None:
        name = task.window + task.epoch * MAX_WINDOWS
        self._assigned[:, task.window % len(self._assigned[0]), task.shard] = name, task.slot, task.number + 1

    def _look_for_failures(self, step: int) -> None:
        if self._error is not None:
            raise self._error
        if self._failed[0]:
            time.sleep(PATIENCE_S)
            who = int(self._failed[0]) - 1
            raise DataError(f"rank {who} of this node could not decode its windows, wanted at step {step}", "its log says why")

    def _padding(self, cut: Cut) -> list[NDArray[Any]]:
        """Return rows for a batch that has none of this node's: the last one read, or one from the file."""
        rows = self._last_rows or [matrix.read_rows(cut.rows[:1]) for matrix in self.matrices]
        return [np.repeat(row, len(cut.rows), axis=0) for row in rows]

    def _stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _barrier(self) -> None:
        self._memory.sync()
        if self._node is not None:
            wait_for_all(self._node)
        self._memory.sync()
