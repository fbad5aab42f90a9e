"""The tests of the data path once more, by four ranks together: two nodes with two ranks each, started by srun."""

from __future__ import annotations

import re
import sys

import pytest
from conftest import ROOT, Cluster
from test_windows_slurm import VARIABLES

pytestmark = [pytest.mark.slurm, pytest.mark.mpi]

# What reads data or says who reads what. Not what forks, which MPI forbids, nor what is about the clock of one rank.
SUITE = (
    *(f"tests/property/test_{name}.py" for name in ("windows", "joined", "views", "data_state")),
    *(f"tests/unit/test_{name}.py" for name in ("reading", "record")),
)


def test_four_ranks_on_two_nodes_pass_what_one_passes(cluster: Cluster) -> None:
    """Windows are shared by the ranks of a node, in the same examples on all ranks; a failure on one ends all."""
    ranks = ["srun", "--mpi=pmix", "-N", "2", "--ntasks-per-node=2", "--kill-on-bad-exit=1", "env", *VARIABLES]
    ranks += ["HPCUTILS_TESTS_TOGETHER=1", "PYTHONDONTWRITEBYTECODE=1", "TF_ENABLE_ONEDNN_OPTS=0"]
    suite = [str(ROOT / file) for file in SUITE]
    words = ["-q", "--color=no", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), *suite]
    done = cluster.run(*ranks, sys.executable, "-m", "pytest", *words, cwd=cluster.home)
    passed = re.findall(r"(\d+) passed", done.stdout)
    assert len(passed) == 4
    assert len(set(passed)) == 1
    assert "failed" not in done.stdout
