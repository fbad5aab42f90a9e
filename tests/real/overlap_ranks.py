"""One rank of tests/real/test_overlap.py, the leader of a node of its own: it reduces over MPI while its data arrives.

mpirun -n 3 python overlap_ranks.py FOLDER SHA256     the data is FOLDER/set.h5

The source gives nothing of the second half before rank 0 has reduced 50 times.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from hpcutils import log
from hpcutils.specs.job import Job
from hpcutils.staging.origins import FolderOrigin
from hpcutils.train.ranks import Ranks
from hpcutils.train.stager import stage_files
from hpcutils.world import World

STEPS = 50


class OneRankANode(Ranks):
    """Ranks of one machine, as if each were on a node of its own."""

    def _connect(self) -> None:
        self.comm = MPI.COMM_WORLD.Dup()
        self.node_comm, self.leader_comm = MPI.COMM_SELF.Dup(), self.comm.Dup()


def hold_back(half: int, go: Path) -> None:
    """Let sources give what lies behind `half` when the file `go` is there; small reads, those of training, pass."""
    honest = FolderOrigin.read

    def read(self: FolderOrigin, piece: Any, buffer: memoryview) -> None:
        while piece.offset + len(buffer) > half and len(buffer) > 1 << 20 and not go.exists():
            time.sleep(0.01)
        honest(self, piece, buffer)

    FolderOrigin.read = read  # type: ignore[method-assign]


def main() -> None:
    folder, sha256 = Path(sys.argv[1]), sys.argv[2]
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    log.configure(f"rank {rank}")
    os.environ["HPCUTILS_NODE_CACHE"] = str(folder / f"node{rank}")
    body = (folder / "set.h5").read_bytes()
    hold_back(len(body) // 2, folder / "go")
    job = Job.model_validate(
        {
            "name": "x",
            "data": {"files": [{"path": "set.h5", "sha256": sha256}], "x": "a", "y": "b", "stage": "overlap"},
            "model": {"function": "model.py:build"},
            "training": {"epochs": 1, "batch_size": 1, "loss": "mse"},
        }
    )
    world = World(rank=rank, world_size=size, node_rank=rank, nodes=size, node=f"node{rank}")
    ranks = OneRankANode(world)
    arrivals = stage_files(job, folder, ranks)
    path = arrivals.staged["set.h5"].path
    before, total, reductions = path.exists(), 0.0, 0
    for step in range(2 * STEPS):
        total += float(ranks.sum(np.ones(1))[0])
        reductions += 1
        arrivals.look(1)
        if step == STEPS and rank == 0:
            (folder / "go").touch()
    part = bytearray(body[len(body) - 7000 : len(body) - 2000])
    for source in arrivals.sources.values():
        part = bytearray(5000)
        source.read_into(len(body) - 7000, memoryview(part))
    arrivals.finish()
    said = {
        "sum": total,
        "reductions": reductions,
        "before": before,
        "read": part == body[len(body) - 7000 : len(body) - 2000] and path.read_bytes() == body,
        "record": arrivals.records[0],
    }
    everybody = ranks.gather(said)
    if rank == 0:
        print(json.dumps(everybody), flush=True)


if __name__ == "__main__":
    main()
