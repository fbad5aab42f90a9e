"""Which process on which host something belongs to, so that another can tell whether that process still runs.

A process number alone is not enough: numbers come back. With the time at which the process started it names one process.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from hpcutils.staging.turn import PF_EXITING

# What belongs to another host cannot be looked at; nothing that old belongs to a job that runs.
OTHER_HOST_S = 30 * 24 * 3600
PATTERN = re.compile(r"(?P<host>.+)-(?P<pid>\d+)-(?P<start>\d+)-(?P<job>\w+)-(?P<unique>[0-9a-f]{8})")


@dataclass(frozen=True)
class Owner:
    """One process.

    Args:
        host: Its machine.
        pid: Its number there.
        start_ticks: When it started, in clock ticks since the machine did.
        job: Its Slurm job, or `none`.
        unique: Eight random digits: one process may own several things.
    """

    host: str
    pid: int
    start_ticks: int
    job: str = "none"
    unique: str = "00000000"

    def __str__(self) -> str:
        return f"{self.host}-{self.pid}-{self.start_ticks}-{self.job}-{self.unique}"


def this_process() -> Owner:
    """Return the owner that this process is, with a new random part."""
    facts = _facts(os.getpid())
    job = re.sub(r"\W", "_", os.environ.get("SLURM_JOB_ID", "")) or "none"
    return Owner(os.uname().nodename, os.getpid(), facts[0] if facts else 0, job, uuid.uuid4().hex[:8])


def is_mine(name: str) -> bool:
    """Say whether a part of a file name tells this process."""
    owner, mine = owner_in(name), this_process()
    return owner is not None and (owner.host, owner.pid, owner.start_ticks) == (mine.host, mine.pid, mine.start_ticks)


def owner_in(name: str) -> Owner | None:
    """Return the owner that a part of a file name tells, or `None`."""
    found = PATTERN.fullmatch(name)
    if found is None:
        return None
    return Owner(found["host"], int(found["pid"]), int(found["start"]), found["job"], found["unique"])


def is_alive(owner: Owner, since_s: float) -> bool:
    """Say whether the process may still run.

    Args:
        owner: The process.
        since_s: When the thing that it owns was last changed (seconds since 1970): what belongs to another host counts as
            alive for a month.
    """
    if owner.host != os.uname().nodename:
        return time.time() - since_s < OTHER_HOST_S
    facts = _facts(owner.pid)
    return facts is not None and facts[0] == owner.start_ticks and not facts[1] & PF_EXITING


def _facts(pid: int) -> tuple[int, int] | None:
    """Return when a process started and the kernel's flags of it; `None` when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # proc(5): behind the name, which may hold anything, the flags are the seventh word and the start the twentieth.
    words = text.rpartition(")")[2].split()
    return int(words[19]), int(words[6])
