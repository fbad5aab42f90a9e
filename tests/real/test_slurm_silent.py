"""Slurm that does not answer. In a file of its own: it takes the controller away for a while."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

pytestmark = [pytest.mark.slurm]


def test_no_answer_is_said_and_nothing_is_left(cluster):
    folder = cluster.job(image="# no image: this Python environment")
    daemons = json.loads(cluster.sandbox("status", "--json").stdout)["daemons"]
    os.kill(daemons["slurmctld@login"], signal.SIGKILL)
    try:
        started = time.monotonic()
        done = cluster.hpcutils("submit", "train.yaml", cwd=folder, check=False)
        assert done.returncode == 8
        assert "Slurm does not answer" in done.stderr
        assert "hint: ask 'scontrol ping'" in done.stderr
        assert time.monotonic() - started < 60
        assert not (folder / "runs").exists() or list((folder / "runs").iterdir()) == []
    finally:
        cluster.sandbox("up", "--nodes", "2", "--gpus", "4")
