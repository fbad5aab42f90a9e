"""Runs that are started on MPI ranks of this machine, stopped, and gone on with by other numbers of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hpcutils.launch.local import LOCAL_ENVIRONMENT, find_mpirun, local_job
from hpcutils.launch.request import Layout
from hpcutils.launch.runs import prepare
from hpcutils.rundir import RunDirectory
from hpcutils.specs.job import load_job

PROGRAM = Path(__file__).with_name("entry_in_windows.py")


def new_run(job_file: Path, name: str, ranks: int) -> RunDirectory:
    run = RunDirectory(job_file.parent / "runs" / name)
    prepare(run, local_job(load_job(job_file), ranks, None), job_file.parent, Layout(1, ranks, 1), None)
    return run


def start(run: RunDirectory, ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Start, or go on with, a run on so many ranks."""
    submission = json.loads(run.submission.read_text())
    run.submission.write_text(json.dumps(submission | {"ranks_per_node": ranks}))
    run.stop.unlink(missing_ok=True)
    argv = [find_mpirun(), "-n", str(ranks), *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    return subprocess.run(
        [*argv, sys.executable, str(PROGRAM), str(run.path), *words],
        env=os.environ | LOCAL_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def lines(run: RunDirectory) -> list[dict]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]
