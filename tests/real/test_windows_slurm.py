"""Windows on a real cluster: two nodes with two ranks each, in the training image, started by srun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import Cluster, own

PROGRAM = Path(__file__).with_name("window_ranks.py")
VARIABLES = ("OMPI_MCA_btl_vader_single_copy_mechanism=none", "PMIX_MCA_gds=hash", "OMPI_MCA_mpi_yield_when_idle=1")

pytestmark = [pytest.mark.slurm, pytest.mark.apptainer]


@pytest.fixture(scope="module")
def folder(cluster: Cluster, image: str) -> Path:
    folder = cluster.home / "windows"
    folder.mkdir()
    shutil.copy(PROGRAM, folder)
    rows = np.arange(405 * 6, dtype="f4").reshape(405, 6)
    with h5py.File(folder / "data.h5", "w") as file:
        file.create_dataset("x", data=rows, chunks=(7, 6), compression="gzip", shuffle=True)
        file["y"] = np.arange(405)
    own(folder)
    return folder


def read(cluster: Cluster, folder: Path, *words: str) -> dict:
    built = cluster.sandbox("user", "--", "hpcutils", "build", "tf-horovod-cpu", "--json").stdout
    sif = json.loads(built.splitlines()[-1])["path"]
    argv = ["srun", "--mpi=pmix", "-N", "2", "--ntasks-per-node=2", "env", *VARIABLES]
    argv += ["apptainer", "--quiet", "exec", "--bind", str(folder), sif, "python3", str(folder / PROGRAM.name)]
    done = cluster.run(*argv, str(folder / "data.h5"), "2", *words, cwd=folder)
    return json.loads(done.stdout.splitlines()[-1])


def test_each_chunk_once_in_the_whole_job(cluster, folder):
    said = read(cluster, folder)
    assert said["chunks"] == [said["all"]] * 3


def test_each_chunk_once_a_node_where_batches_are_cut_by_count(cluster, folder):
    said = read(cluster, folder, "by_shards=0")
    assert said["chunks"] == [2 * said["all"]] * 3


def test_mpio_is_collective(cluster, folder):
    """HDF5 itself says so after each read, on a compressed and on a contiguous dataset."""
    said = read(cluster, folder, "mpio=1")
    assert said["chunks"] == [said["all"]] * 3
    assert said["reads"]["collective"] > 0
    assert said["reads"]["other"] == 0


def test_without_threads(cluster, folder):
    said = read(cluster, folder, "background=0")
    assert said["chunks"] == [said["all"]] * 3
