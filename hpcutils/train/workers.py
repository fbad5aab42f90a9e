"""Workers that make the batches of user Sequences ahead of the steps: threads of this process, or processes of their own.

Each worker is a thread here. It makes batches itself, or asks the one process that belongs to it and waits for the answer.
Neither ever calls MPI. The processes are started anew (never forked: MPI, Horovod and TensorFlow run in this one by now), see
nothing of the launcher's variables, and end when this process does.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

from hpcutils import shell
from hpcutils.errors import HpcutilsError, JobFailedError
from hpcutils.train.pipeline import Copy, Recipe

# Of a worker: the batches that wait for their step, or are being made.
BATCHES_AHEAD = 2
# How long a process may take to end once it is asked, or has closed its end.
GRACE_S = 5.0
# Whoever sees one of these takes itself for a rank.
LAUNCHER_PREFIXES = ("SLURM_", "SLURMD_", "PMI_", "PMIX_", "PMI2_", "OMPI_", "PRTE_", "PRRTE_", "MPI_", "HYDRA_", "HOROVOD_")
# The devices are the rank's.
NO_DEVICES = {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1", "ROCR_VISIBLE_DEVICES": ""}


class Maker(Protocol):
    """Makes one batch at a time."""

    def make(self, which: str, epoch: int, number: int) -> Any:
        """Return a batch of one of the Sequences, in an epoch."""

    def close(self) -> None:
        """Let go of everything."""


class Workers:
    """A number of makers, and a thread for each.

    Args:
        makers: What makes the batches; each is only ever used by one thread.
    """

    def __init__(self, makers: Iterable[Maker]) -> None:
        self._makers = list(makers)
        self._tasks: queue.SimpleQueue[tuple[str, int, int, Future[Any]] | None] = queue.SimpleQueue()
        # Daemons: a rank that fails must not wait for them.
        self._threads = [threading.Thread(target=self._work, args=(maker,), daemon=True) for maker in self._makers]
        for thread in self._threads:
            thread.start()

    def ahead(self, which: str, epoch: int, numbers: Iterable[int]) -> Iterator[Any]:
        """Yield batches in the order of `numbers`; the next few are made meanwhile. An error comes where its batch would."""
        waiting: deque[Future[Any]] = deque()
        numbers = iter(numbers)
        while True:
            for number in numbers:
                waiting.append(self._submit(which, epoch, number))
                if len(waiting) >= BATCHES_AHEAD * len(self._makers):
                    break
            if not waiting:
                return
            yield waiting.popleft().result()

    def close(self) -> None:
        """End all workers; what they are at is finished first."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        for maker in self._makers:
            maker.close()

    def _submit(self, which: str, epoch: int, number: int) -> Future[Any]:
        future: Future[Any] = Future()
        self._tasks.put((which, epoch, number, future))
        return future

    def _work(self, maker: Maker) -> None:
        while (task := self._tasks.get()) is not None:
            which, epoch, number, future = task
            try:
                future.set_result(maker.make(which, epoch, number))
            except BaseException as exc:  # noqa: BLE001 - passed on to who waits for the batch
                future.set_exception(exc)


class InThread:
    """Makes batches of this process' own copies, which have begun the epoch.

    Args:
        copies: By name; shared by all threads.
    """

    def __init__(self, copies: Mapping[str, Copy]) -> None:
        self._copies = copies

    def make(self, which: str, epoch: int, number: int) -> Any:
        return self._copies[which].make(number)

    def close(self) -> None:
        """Nothing to do."""


class InProcess:
    """Makes batches in a process of its own (`hpcutils.train.worker`), which has its own copies.

    Must be made in the main thread: the process ends when the thread that started it does.

    Args:
        recipes: How it makes its copies, by name.
    """

    def __init__(self, recipes: Mapping[str, Recipe]) -> None:
        self._recipes = dict(recipes)
        ours, theirs = socket.socketpair()
        argv = [sys.executable, "-m", "hpcutils.train.worker", str(theirs.fileno()), str(os.getpid())]
        with theirs:
            self._process = shell.start(argv, env=worker_environment(os.environ), keep_open=[theirs.fileno()])
        with ours:
            self._stream = ours.makefile("rwb")
        self._say(self._recipes)

    def make(self, which: str, epoch: int, number: int) -> Any:
        try:
            self._say((which, epoch, number))
            # Large arrays are read straight into their memory.
            answer = pickle.load(self._stream)
        except (EOFError, OSError, pickle.UnpicklingError) as exc:
            raise JobFailedError(
                f"a worker process {self._end()} before batch {number} of {self._recipes[which].reference} was made",
                "its own words, if it had any, are above, in this rank's log; SIGKILL often means that memory was used up: "
                "ask for more, or for fewer workers",
            ) from exc
        if isinstance(answer, HpcutilsError):
            raise answer
        return answer

    def close(self) -> None:
        """Ask the process to end, and see to it."""
        # A question that a process did not live to read is still in the buffer.
        with contextlib.suppress(BrokenPipeError):
            self._stream.close()
        self._end()

    def _say(self, words: Any) -> None:
        pickle.dump(words, self._stream, protocol=5)
        self._stream.flush()

    def _end(self) -> str:
        """Wait for the end of a process that has no reason to go on, and return how it came."""
        try:
            code = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return "lost touch and was killed"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a worker process: nothing of a launcher's, and no GPU."""
    kept = {name: value for name, value in environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    return kept | NO_DEVICES
