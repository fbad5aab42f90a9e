"""The run directory: every file name of a run is made here and nowhere else.

runs/digits-20260131-142501-3f9c/
    job.json            the resolved job           submission.json   what was asked of Slurm, by whom, from which code
    code/               snapshot of the user's code  sbatch.sh         the script as Slurm got it
    logs/restart-0/     rank-0.log …, batch.log    metrics.jsonl     one line an epoch
    checkpoints/        epoch-0003.keras           provenance.json   image, data and code digests, versions, Slurm job
    model.keras summary.txt model.png              result.json       the outcome; failure.json when it failed
    exit_code           written last, by the batch script
    stop                asks the ranks to stop after their epoch    stopped    rank 0's answer: they did, at a checkpoint
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcutils import fs
from hpcutils.errors import SpecError


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    path: Path

    @property
    def run_id(self) -> str:
        """The run's name: that of its folder."""
        return self.path.name

    @property
    def job(self) -> Path:
        return self.path / "job.json"

    @property
    def submission(self) -> Path:
        return self.path / "submission.json"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def sbatch(self) -> Path:
        return self.path / "sbatch.sh"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def submitit(self) -> Path:
        return self.path / ".submitit"

    @property
    def current_logs(self) -> Path:
        """Logs of the newest (re)start: a link that the batch script moves."""
        return self.logs / "current"

    @property
    def batch_log(self) -> Path:
        return self.logs / "batch.log"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model.keras"

    @property
    def summary(self) -> Path:
        return self.path / "summary.txt"

    @property
    def picture(self) -> Path:
        return self.path / "model.png"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def failure(self) -> Path:
        return self.path / "failure.json"

    @property
    def stop(self) -> Path:
        """A file that asks the ranks to stop after their epoch; the batch script makes it when the time limit is near."""
        return self.path / "stop"

    @property
    def stopped(self) -> Path:
        """A file by which rank 0 says that all ranks stopped at a checkpoint, to be run again."""
        return self.path / "stopped"

    @property
    def exit_code(self) -> Path:
        return self.path / "exit_code"

    def rank_log(self, rank: int | str) -> Path:
        """Return the newest log of a rank (`%t` for srun's own pattern)."""
        return self.current_logs / f"rank-{rank}.log"


def new_run_id(name: str) -> str:
    """Return `digits-20260131-142501-3f9c`: sorts by time, and two in one second differ."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def find_run(name: str, runs: Path) -> RunDirectory:
    """Find a run by folder, id, unique beginning of an id, or `latest`.

    Raises:
        SpecError: None or several match.
    """
    direct = Path(name)
    if (direct / "job.json").is_file():
        return RunDirectory(direct.resolve())
    known = sorted((path.parent for path in runs.glob("*/job.json")), key=lambda path: path.stat().st_mtime)
    if name == "latest" and known:
        return RunDirectory(known[-1].resolve())
    found = [path for path in known if path.name.startswith(name)]
    if len(found) == 1:
        return RunDirectory(found[0].resolve())
    what = "no run" if not found else f"{len(found)} runs"
    listed = ", ".join(path.name for path in (found or known)[-5:]) or "none"
    raise SpecError(f"{what} called {name!r} in {runs}", f"there are: {listed}")


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically, with sorted keys so that two runs can be compared."""
    fs.write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; `None` when there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
