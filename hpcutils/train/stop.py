"""How a rank ends that stopped at a checkpoint, to be run again."""

from __future__ import annotations

from hpcutils.errors import EXIT_REQUEUE


class StoppedToGoOn(SystemExit):
    """All ranks stopped in order; the batch script puts the job back into the queue. Any other `SystemExit` is the user's own."""

    def __init__(self) -> None:
        super().__init__(EXIT_REQUEUE)
