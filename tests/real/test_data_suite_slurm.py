"""The tests of the data path once more, by four ranks together: two nodes with two ranks each, started by srun."""

from __future__ import annotations

import re
import sys

import pytest
from conftest import ROOT, Cluster
from test_windows_slurm import VARIABLES

pytestmark = [pytest.mark.slurm, pytest.mark.mpi]

# All that is about the order, the reading and the dealing out of data. What is about one process' clock is not here.
PROPERTIES = ("batches", "codecs", "data_state", "hdf5_keys", "joined", "order", "unshuffle", "views", "windows")
UNITS = ("data_reference", "hdf5_files", "hdf5matrix", "job_data", "quality", "reading", "record", "user_sequences")
SUITE = (*(f"tests/property/test_{name}.py" for name in PROPERTIES), *(f"tests/unit/test_{name}.py" for name in UNITS))


def test_four_ranks_on_two_nodes_pass_what_one_passes(cluster: Cluster) -> None:
    """Windows are shared by the ranks of a node, in the same examples on all ranks; a failure on one ends all."""
    ranks = ["srun", "--mpi=pmix", "-N", "2", "--ntasks-per-node=2", "--kill-on-bad-exit=1", "env", *VARIABLES]
    ranks += ["HPCUTILS_TESTS_TOGETHER=1", "PYTHONDONTWRITEBYTECODE=1", "TF_ENABLE_ONEDNN_OPTS=0"]
    suite = [str(ROOT / file) for file in SUITE]
    words = [
        "-q",
        "--color=no",
        "-m",
        "not forks",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(ROOT),
        "-c",
        str(ROOT / "pyproject.toml"),
        *suite,
    ]
    done = cluster.run(*ranks, sys.executable, "-m", "pytest", *words, cwd=cluster.home)
    passed = re.findall(r"(\d+) passed", done.stdout)
    assert len(passed) == 4
    assert len(set(passed)) == 1
    assert "failed" not in done.stdout
