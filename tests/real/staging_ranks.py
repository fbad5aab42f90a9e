"""One rank of tests/real/test_staging_mpi.py: it stages as the leader of a node of its own, and says on stdout what it saw.

mpirun -n 4 python staging_ranks.py FOLDER SPEC     SPEC is JSON, see `main`
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from mpi4py import MPI

from hpcutils import log
from hpcutils.errors import HpcutilsError
from hpcutils.staging import landing, move, ring, store
from hpcutils.staging.items import Item, Settings
from hpcutils.staging.leaders import Leaders
from hpcutils.staging.load import Load
from hpcutils.staging.stage import stage_item, stage_manifest


def read_bytes() -> int:
    """Return the bytes that this process asked the kernel for so far (proc(5): rchar)."""
    return int(Path("/proc/self/io").read_text().split()[1])


def flip_bits(times: int, number: int) -> None:
    """Damage what this rank hands on of one segment, so many times."""
    honest, left = ring.Ring.outgoing, [times]

    def outgoing(self: ring.Ring, load: Load) -> memoryview:
        data = honest(self, load)
        if load.segment.number != number or left[0] == 0:
            return data
        left[0] -= 1
        damaged = bytearray(data)
        damaged[len(damaged) // 2] ^= 1
        return memoryview(damaged)

    ring.Ring.outgoing = outgoing  # type: ignore[method-assign]


def full() -> None:
    raise OSError(28, "No space left on device")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def when_written(size_bytes: int, happens: Callable[[], None]) -> None:
    """Let something happen when this rank has written so much and is about to write more."""
    honest = landing.Landing._put

    def put(self: landing.Landing, piece: object, data: memoryview) -> None:
        if self.landed_bytes >= size_bytes:
            happens()
        honest(self, piece, data)  # type: ignore[arg-type]

    landing.Landing._put = put  # type: ignore[method-assign]


def at_publish(when: str, happens: Callable[[], None]) -> None:
    """Let something happen on this rank `before` or `after` it gives the dataset its name."""
    honest = store.complete

    def complete(*words: object) -> None:
        if when == "before":
            happens()
        honest(*words)  # type: ignore[arg-type]
        if when == "after":
            happens()

    store.complete = complete


def full_at(step: str) -> None:
    """Let this rank's disk be full at a step that is no writing of a segment."""

    def refused(*words: object, **more: object) -> None:
        full()

    owner, name = {
        "the folder": (store, "new_partial"),
        "the sidecar": (store, "write_finished"),
        "opening": (landing.Landing, "__init__"),
        "the list": (move.Move, "_list"),
        "the marker": (store, "marker_lines"),
        "the name": (store, "_named"),
    }[step]
    setattr(owner, name, refused)


def main() -> None:
    folder, spec = Path(sys.argv[1]), json.loads(sys.argv[2])
    world = MPI.COMM_WORLD
    log.configure(f"rank {world.rank}")
    if world.rank == spec.get("flips_on"):
        flip_bits(spec["flips"], spec["segment"])
    if world.rank == spec.get("full_on"):
        when_written(spec["full_after"], full)
    if world.rank == spec.get("dies_on"):
        when_written(spec["dies_after"], die)
    if world.rank == spec.get("dies_at_publish"):
        at_publish(spec["when"], die)
    if world.rank == spec.get("full_at_step_on"):
        full_at(spec["step"])
    settings = Settings(folder / f"node{world.rank}")
    leaders = Leaders(world.Dup(), f"node{world.rank}")
    before = read_bytes()
    try:
        if "item" in spec:
            outcome = stage_item(Item(**spec["item"]), settings, leaders)
        else:
            source = spec["sources"][world.rank] if "sources" in spec else spec["source"]
            outcome = stage_manifest(Path(spec["manifest"]), source, settings, leaders)
        said = {"files": str(outcome.files), **outcome.record()}
    except HpcutilsError as exc:
        said = {"error": type(exc).__name__, "message": exc.message}
    facts = {"rank": world.rank, "rchar": read_bytes() - before, **said}
    # One writer: lines of several ranks would run into each other.
    for line in world.gather(json.dumps(facts)) or []:
        print(line, flush=True)


if __name__ == "__main__":
    main()
