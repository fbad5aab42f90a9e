"""The job's files while training goes on: moved by one thread of each node's leader, read meanwhile by all its ranks.

Whoever trains asks now and then whether the thread failed (`look`), and waits for it before anything is a success (`finish`).
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from hpcutils.errors import HpcutilsError, JobFailedError
from hpcutils.log import LOGGER
from hpcutils.staging.items import Staged
from hpcutils.staging.overlay import Arriving, Overlay
from hpcutils.staging.plan import shown_bytes
from hpcutils.staging.stage import Coming
from hpcutils.train.ranks import Ranks


class Arrivals:
    """The job's files on this node. All ranks make it together; nothing is left to do where all files are there.

    Args:
        ranks: All ranks.
        staged: The files by name.
        records: What staging each dataset took, if all are done.
        arriving: The files that are not here yet, each with the number of its dataset.
        comings: On a leader: all datasets, in the order in which they are moved.

    Attributes:
        staged: The files by name: where they are, or will be.
        sources: What files that are not there yet are read from, by name.
        records: For the run's record; complete after `finish`.
        is_open: Whether anything was still to be moved when training began; the same on all ranks.
    """

    def __init__(
        self,
        ranks: Ranks,
        staged: dict[str, Staged],
        records: list[dict[str, Any]],
        arriving: dict[str, tuple[int, Arriving]],
        comings: list[Coming],
    ) -> None:
        self.staged, self.records = staged, records
        self.sources = {name: Overlay(file) for name, (_, file) in arriving.items()}
        self._datasets = {name: number for name, (number, _) in arriving.items()}
        self._ranks, self._comings = ranks, comings
        self._error: HpcutilsError | None = None
        self._steps = 0
        self._steps_at_end: int | None = None
        self._thread: threading.Thread | None = None
        # Also a leader that lacks nothing has a part in it: others may get what they lack from it.
        self.is_open = any(ranks.gather(any(coming.outcome is None for coming in comings)))
        if self.is_open and comings:
            self._thread = threading.Thread(target=self._move, name="hpcutils-staging", daemon=True)
            self._thread.start()

    def look(self, steps: int) -> None:
        """Take note that so many steps more are done; costs next to nothing.

        Raises:
            HpcutilsError: What ended the moving on this node's leader; on that rank.
        """
        self._steps += steps
        if self._error is not None:
            raise self._error

    def leave(self, code: int) -> NoReturn:
        """End this process at once, in the middle of the moving: what has landed stays for the next job.

        A thread that waits for a slow source, or for a message, would keep the interpreter and MPI from ending.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def finish(self) -> None:
        """Wait until everything is there, and proved; all ranks call it together.

        Raises:
            HpcutilsError: What ended the moving; or something that was read through is not what came. On every rank.
        """
        if not self.is_open:
            return
        self._ranks.together(self._await)
        self._ranks.together(self._prove)
        for overlay in self.sources.values():
            overlay.close()
        self.is_open = False
        self._record()

    def _move(self) -> None:
        """Move one dataset after the other (in a thread)."""
        try:
            for coming in self._comings:
                coming.finish()
        except HpcutilsError as exc:
            self._error = exc
        except BaseException as exc:  # noqa: BLE001 - the end of a thread: `look` and `finish` raise it
            traceback.print_exc()
            self._error = JobFailedError(
                f"staging failed: {type(exc).__name__}: {exc}", "the traceback is above, in this rank's log"
            )
        self._steps_at_end = self._steps
        if self._error is None and self._ranks.world.rank == 0:
            LOGGER.info("staging ended after %d steps of training", self._steps_at_end)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _await(self) -> None:
        started_s = time.monotonic()
        if self._thread is not None and self._thread.is_alive() and self._ranks.world.rank == 0:
            LOGGER.info("training is done; waiting for staging")
        self._join()
        if self._error is not None:
            raise self._error
        waited_s = time.monotonic() - started_s
        if waited_s > 1 and self._ranks.world.rank == 0:
            LOGGER.info("waited %.1f s for staging", waited_s)

    def _prove(self) -> None:
        for overlay in self.sources.values():
            overlay.prove()

    def _record(self) -> None:
        """Put together what staging took, over all ranks."""
        steps = self._ranks.broadcast(self._steps_at_end)
        records = [coming.outcome.record() for coming in self._comings if coming.outcome is not None]
        through = self._ranks.gather([(self._datasets[name], source.read_through_bytes) for name, source in self.sources.items()])
        self.records = self._ranks.broadcast(records)
        for number, record in enumerate(self.records):
            own = sum(read for each in through for dataset, read in each if dataset == number)
            record |= {"read_through_bytes": own, "steps_meanwhile": steps}
        if self._ranks.world.rank == 0:
            total = sum(read for each in through for _, read in each)
            LOGGER.info("%s were read through to the source while it arrived; all of it proved right", shown_bytes(total))
