"""Windows over real MPI ranks: every sample once, every chunk once, whatever the ranks and nodes; no rank waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcutils.launch.local import LOCAL_ENVIRONMENT, find_mpirun

PROGRAM = Path(__file__).with_name("window_ranks.py")
ROWS = 405

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("windows") / "data.h5"
    with h5py.File(path, "w") as file:
        rows = np.arange(ROWS * 6, dtype="f4").reshape(ROWS, 6)
        file.create_dataset("x", data=rows, chunks=(7, 6), compression="gzip", shuffle=True)
        file.create_dataset("y", data=np.arange(ROWS), chunks=(50,))
    return path


def mpirun(ranks: int, path: Path, nodes: int, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [find_mpirun(), "-n", str(ranks), *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    return subprocess.run(
        [*argv, sys.executable, str(PROGRAM), str(path), str(nodes), *words],
        env=os.environ | LOCAL_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def read(ranks: int, path: Path, nodes: int, *words: str) -> dict:
    done = mpirun(ranks, path, nodes, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_of_one_node_fetch_each_chunk_once_an_epoch(path, ranks):
    said = read(ranks, path, 1)
    assert said["chunks"] == [said["all"]] * 3


def test_nodes_that_own_shards_fetch_each_chunk_once_in_the_whole_job(path):
    said = read(4, path, 2)
    assert said["chunks"] == [said["all"]] * 3


def test_nodes_that_cut_by_count_fetch_each_chunk_once_a_node(path):
    said = read(4, path, 2, "by_shards=0")
    assert said["chunks"] == [2 * said["all"]] * 3


@pytest.mark.parametrize("words", [("batch=1",), ("batch=400",), ("pool=24",), ("pool=100000",)])
def test_batches_and_windows_of_any_size(path, words):
    said = read(2, path, 1, "epochs=2", *words)
    assert said["chunks"] == [said["all"]] * 2


def test_without_threads(path):
    """Where MPI may not be called from threads each rank decodes before it reads, also what only the others need."""
    said = read(3, path, 1, "background=0")
    assert said["chunks"] == [said["all"]] * 3


def test_a_rank_that_cannot_read_ends_the_others(path):
    done = mpirun(2, path, 1, "fail=1")
    assert done.returncode != 0
    assert "closed" in done.stderr
