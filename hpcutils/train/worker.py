"""What a worker process runs: batches of the user's Sequences, one after the other, for the rank that started it.

    python -m hpcutils.train.worker SOCKET RANKS-PROCESS

Over the socket it gets its recipes once, then `(which, epoch, number)` for each batch, and answers with the batch or an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from hpcutils.errors import HpcutilsError, JobFailedError
from hpcutils.train.pipeline import TRACEBACK_HINT, Copy, Recipe

PR_SET_PDEATHSIG = 1


def main(handle: int, rank_process: int) -> None:
    """Serve until the rank closes its end."""
    end_with(rank_process)
    # Ctrl-C reaches the rank as well, which then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What the user's code starts must not keep the rank's socket open.
    os.set_inheritable(handle, False)
    with socket.socket(fileno=handle) as connection:
        stream = connection.makefile("rwb")
    # Broken: the rank is gone.
    with contextlib.suppress(EOFError, ConnectionError):
        serve(stream)


def serve(stream: Any) -> None:
    """Answer each question with a batch or an error."""
    recipes: Mapping[str, Recipe] = pickle.load(stream)
    copies: dict[str, Copy] = {}
    while True:
        which, epoch, number = pickle.load(stream)
        pickle.dump(answer(recipes[which], copies, which, epoch, number), stream, protocol=5)
        stream.flush()


def answer(recipe: Recipe, copies: dict[str, Copy], which: str, epoch: int, number: int) -> Any:
    """Return a batch, or the error that stands in its place."""
    try:
        if which not in copies:
            copies[which] = Copy(recipe)
        copies[which].begin(epoch)
        return copies[which].make(number)
    except HpcutilsError as exc:
        return exc
    except Exception as exc:  # noqa: BLE001 - a process boundary: the rank must hear of it
        traceback.print_exc()
        where = f"a worker process could not make batch {number} of {recipe.reference}"
        return JobFailedError(f"{where}: {type(exc).__name__}: {exc}", TRACEBACK_HINT)


def end_with(rank_process: int) -> None:
    """Have the kernel kill this process when the rank ends, however it does, even in the middle of the user's code."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank_process:
        sys.exit("the rank that started this worker is gone")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
