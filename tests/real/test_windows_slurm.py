"""Windows on a real cluster: two nodes with two ranks each, in the training image, started by srun."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, Cluster, own
from test_resume import MAKE

from hpcutils.launch.local import local_job
from hpcutils.launch.request import Layout
from hpcutils.launch.runs import prepare
from hpcutils.rundir import RunDirectory
from hpcutils.specs.job import load_job

PROGRAM = Path(__file__).with_name("window_ranks.py")
ENTRY = Path(__file__).with_name("entry_in_windows.py")
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


def srun(cluster: Cluster, folder: Path, program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the folder in the image, on two nodes with two ranks each."""
    built = cluster.sandbox("user", "--", "hpcutils", "build", "tf-horovod-cpu", "--json").stdout
    sif = json.loads(built.splitlines()[-1])["path"]
    argv = ["srun", "--mpi=pmix", "-N", "2", "--ntasks-per-node=2", "env", *VARIABLES]
    argv += ["apptainer", "--quiet", "exec", "--bind", str(folder), sif, "python3", str(folder / program.name)]
    return cluster.run(*argv, *words, cwd=folder)


def read(cluster: Cluster, folder: Path, *words: str) -> dict:
    return json.loads(srun(cluster, folder, PROGRAM, str(folder / "data.h5"), "2", *words).stdout.splitlines()[-1])


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


def test_training_by_mpio_calls_mpi_in_the_main_thread_alone(cluster, image):
    """A whole job: collective reads lie between the steps, in the thread that runs them."""
    folder = cluster.home / "by-mpio"
    folder.mkdir()
    shutil.copy(ENTRY, folder)
    text = (ROOT / "jobs" / "digits" / "train.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.strip().startswith("sha256:")]
    text = (
        "\n".join(lines)
        .replace("1437", "5001")
        .replace("epochs: 14", "epochs: 2")
        .replace("  x: images", "  x: images\n  read: mpio")
    )
    (folder / "train.yaml").write_text(text + "\n")
    shutil.copy(ROOT / "jobs" / "digits" / "model.py", folder)
    (folder / "make_data.py").write_text(MAKE)
    subprocess.run([sys.executable, "make_data.py"], cwd=folder, check=True)
    job = load_job(folder / "train.yaml")
    resources = local_job(job, 4, None).resources.model_copy(update={"nodes": 2, "gpus": 4})
    run = RunDirectory(folder / "runs" / "one")
    prepare(run, job.model_copy(update={"resources": resources}), folder, Layout(2, 2, 1), None)
    own(folder)
    srun(cluster, folder, ENTRY, str(run.path), "main_thread=1")
    written = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(line["read"], line["chunks_read"], line["coverage"]) for line in written] == [("mpio", 1.0, "exact")] * 2
