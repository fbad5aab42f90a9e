"""Slurm that does not answer. In a file of its own: it takes the controller away for a while."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slurm]


def controller(name: str) -> int:
    """Return the pid of a sandbox's slurmctld."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if words[0].endswith(b"slurmctld") and any(f"/{name}/".encode() in word for word in words):
                return int(entry.name)
    raise AssertionError(f"no slurmctld of sandbox {name}")


def test_no_answer_is_said_and_nothing_is_left(cluster):
    folder = cluster.job(image="# no image: this Python environment")
    os.kill(controller(cluster.name), signal.SIGKILL)
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
