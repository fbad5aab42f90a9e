"""`hpcutils.train.entry` where memory is as good as full, so that a small data set is read in windows.

    python entry_in_windows.py RUN [stop=STEP] [epoch=EPOCH] [kill=STEP] [lose=1] [level=LEVEL] [main_thread=1]

stop         asks the run to stop after so many steps of its first epoch (or EPOCH, from 0), as Slurm does near the time limit
kill         the last rank kills itself (SIGKILL) after so many steps of its first epoch
lose         rank 0 counts one of its samples as another
level        the thread level that MPI is asked for
main_thread  calls of the data path to MPI fail in any other thread

Each rank appends a line to RUN/seen-RANK.jsonl for each batch that a step has used: epoch, step, its samples.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# As `train.devices.prepare` does for simulated devices, before TensorFlow is imported below.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

from hpcutils.data import collective, shards, shared, windows
from hpcutils.train import entry, reading

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("SLURM_PROCID", "0")))


def main() -> None:
    run = Path(sys.argv[1])
    options = dict(word.split("=") for word in sys.argv[2:])
    shards.POOL_BYTES = 64 << 10
    reading.free_memory_bytes = lambda: 1 << 20
    if "level" in options:
        import mpi4py

        mpi4py.rc.thread_level = options["level"]
    if "main_thread" in options:
        guard_mpi()
    write_down(run / f"seen-{RANK}.jsonl")
    if "lose" in options and RANK == 0:
        lose()
    if "stop" in options:
        stop_after(run, int(options["stop"]), int(options["epoch"]) if "epoch" in options else None)
    if "kill" in options:
        kill_after(int(options["kill"]))
    entry.run_rank(str(run))


def guard_mpi() -> None:
    """Make what the data path calls of MPI fail in any thread but the first."""

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def checked(*args: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                raise AssertionError(f"{call.__qualname__} was called in {threading.current_thread().name}")
            return call(*args)

        return checked

    shared.SharedMemory.sync = guarded(shared.SharedMemory.sync)
    windows.wait_for_all = guarded(windows.wait_for_all)
    collective.CollectiveReader._read_together = guarded(collective.CollectiveReader._read_together)


def write_down(path: Path) -> None:
    """Append the samples of each batch of the training data once a step has used it."""
    from hpcutils.train.feed import Feed, RowFeed

    begin, used = RowFeed._begin, Feed.used

    def begin_and_note(self: Any, epoch: int, first_step: int) -> Any:
        make = begin(self, epoch, first_step)
        self.noted = noted = deque()

        def make_and_note(step: int) -> Any:
            batch, rows = make(step)
            noted.append((epoch, step, rows.tolist()))
            return batch, rows

        return make_and_note

    def use_and_write(self: Any) -> None:
        used(self)
        if not hasattr(self, "noted"):
            return
        note = self.noted.popleft()
        if self.order.shuffle:
            with path.open("a") as stream:
                stream.write(json.dumps(note) + "\n")

    RowFeed._begin, Feed.used = begin_and_note, use_and_write


def lose() -> None:
    from hpcutils.train.feed import RowFeed

    begin = RowFeed._begin

    def begin_and_lose(self: Any, epoch: int, first_step: int) -> Any:
        make = begin(self, epoch, first_step)

        def make_wrongly(step: int) -> Any:
            batch, rows = make(step)
            if step == 3:
                rows[0] = (rows[0] + 1) % self.order.samples
            return batch, rows

        return make_wrongly

    RowFeed._begin = begin_and_lose


def stop_after(run: Path, step: int, epoch: int | None) -> None:
    from hpcutils.train import record, steps

    record.LOOK_S, steps.STEPS_PER_CALL = -1.0, 1
    look = record.Recorder._look_for_stop

    def ask_and_look(self: Any) -> None:
        if self._train.runner.done == step and epoch in (None, self._epoch) and self.ranks.world.rank == 0:
            (run / "stop").touch()
        look(self)

    record.Recorder._look_for_stop = ask_and_look


def kill_after(step: int) -> None:
    """End the last rank as the kernel does when memory runs out: nothing is flushed, nobody is told."""
    from hpcutils.train.steps import StepRunner

    call = StepRunner.__call__

    def call_and_die(self: Any, iterator: Any) -> Any:
        done = call(self, iterator)
        if self.done >= step and int(os.environ["OMPI_COMM_WORLD_SIZE"]) == RANK + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    StepRunner.__call__ = call_and_die


if __name__ == "__main__":
    main()
