"""Slurm that does not answer. In a file of its own: it takes the controller away for a while."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Cluster, wait_until

pytestmark = [pytest.mark.slurm]


@pytest.fixture
def folder(cluster: Cluster) -> Iterator[Path]:
    """A job without an image; afterwards the cluster is whole again, and empty."""
    yield cluster.job(image="# no image: this Python environment")
    cluster.sandbox("up", "--nodes", "2", "--gpus", "4")
    cluster.run("scancel", "--user=hpcuser")


def daemon(cluster: Cluster, name: str) -> int:
    """Return the process id of a daemon of the sandbox."""
    return json.loads(cluster.sandbox("status", "--json").stdout)["daemons"][name]


def runs_of(folder: Path) -> list[Path]:
    return list((folder / "runs").iterdir()) if (folder / "runs").exists() else []


@pytest.mark.parametrize("name", ["slurmctld@login", "munged@login"])
def test_no_answer_is_said_and_nothing_is_left(cluster, folder, name):
    os.kill(daemon(cluster, name), signal.SIGKILL)
    started = time.monotonic()
    done = cluster.hpcutils("submit", "train.yaml", cwd=folder, check=False)
    assert done.returncode == 8, done.stderr
    assert "Slurm does not answer" in done.stderr
    assert "hint: ask 'scontrol ping'" in done.stderr
    assert time.monotonic() - started < 60
    assert runs_of(folder) == []


def test_a_controller_that_hangs_is_given_up(cluster, folder):
    controller = daemon(cluster, "slurmctld@login")
    os.kill(controller, signal.SIGSTOP)
    try:
        started = time.monotonic()
        done = cluster.hpcutils("submit", "train.yaml", cwd=folder, check=False)
        assert done.returncode == 8, done.stderr
        assert "hint: " in done.stderr
        assert time.monotonic() - started < 120
        assert runs_of(folder) == []
    finally:
        os.kill(controller, signal.SIGCONT)
    # A request that the controller took up afterwards is a job without a folder: it ends where it starts, and trains nothing.
    queue = ("squeue", "--noheader", "--states=RUNNING,COMPLETING,CONFIGURING", "--user=hpcuser", "--format=%i")
    wait_until(lambda: (said := cluster.run(*queue, check=False)).returncode == 0 and not said.stdout.strip(), 90, "nothing runs")
    assert list(folder.rglob("result.json")) == []


def test_ctrl_c_while_the_controller_hangs(cluster, folder):
    controller = daemon(cluster, "slurmctld@login")
    os.kill(controller, signal.SIGSTOP)
    try:
        script = "hpcutils submit train.yaml & pid=$!; sleep 6; kill -TERM $pid; wait $pid"
        started = time.monotonic()
        done = cluster.run("bash", "-c", script, cwd=folder, check=False)
        assert done.returncode in (8, 130), done.stderr  # 8: sbatch itself had given up before
        assert time.monotonic() - started < 60
        assert runs_of(folder) == []
    finally:
        os.kill(controller, signal.SIGCONT)
