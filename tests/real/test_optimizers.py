"""Optimizers over two MPI ranks: what one rank makes of the whole batch, two make of its halves, bit for bit alike on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from optimizer_ranks import CASES

from hpcutils.launch.local import LOCAL_ENVIRONMENT, find_mpirun

PROGRAM = Path(__file__).with_name("optimizer_ranks.py")

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI", "OMPI_"))}
    argv = [find_mpirun(), "-n", "2", *root, sys.executable, str(PROGRAM)]
    done = subprocess.run(argv, env=environ | LOCAL_ENVIRONMENT, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_as_one(found, case):
    """Also that clipping sees the averaged gradient: the halves' own gradients, clipped, would sum up to something else."""
    result = found[case]
    assert result["agree"]
    assert result["went"] > 0.01
    assert result["apart"] < 1e-4


def test_an_overflow_on_one_rank_skips_the_step_on_both(found):
    assert found["overflow"]["agree"]
    assert found["overflow"]["went"] > 0.01
    assert found["overflow"]["apart"] < 1e-4


def test_mixed_precision(found):
    assert found["mixed_precision"]["agree"]
    assert found["mixed_precision"]["went"] > 0.01
    # Half precision: each rank rounds other sums.
    assert found["mixed_precision"]["apart"] < 0.02


def test_batch_normalisation_keeps_the_ranks_together(found):
    """Each rank normalises by its own half, so one rank's result is another; weights and moving statistics are the same on both."""
    assert found["batch_norm"]["agree"]
    assert found["batch_norm"]["state_agrees"]
    assert found["batch_norm"]["apart"] > 0


def test_a_world_of_one_counts_a_repeated_word_alike(found):
    """Keras' Adam, given the sparse gradient of an embedding, squares the parts of a word that occurs twice by themselves."""
    assert found["world_of_one"]["apart"] < 1e-4


def test_a_model_with_nothing_to_train(found):
    assert found["untrainable"]["agree"]
