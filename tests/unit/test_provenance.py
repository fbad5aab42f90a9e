"""What is known of a run that failed, and a world that is not the one that was submitted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_slurm import fake_slurm

from hpcutils.errors import WorldError
from hpcutils.launch.request import Layout
from hpcutils.launch.runs import prepare
from hpcutils.rundir import RunDirectory
from hpcutils.specs.job import load_job
from hpcutils.train import main
from hpcutils.world import World

CPU = "resources: {devices: simulated}\n"


@pytest.fixture
def job_folder(tmp_path: Path) -> Path:
    return fake_slurm(tmp_path).job


def prepared(job_folder: Path, layout: Layout) -> RunDirectory:
    """A run as `submit` leaves it."""
    with (job_folder / "train.yaml").open("a") as file:
        file.write(CPU)
    run = RunDirectory(job_folder / "runs" / "tiny-1")
    prepare(run, load_job(job_folder / "train.yaml"), job_folder, layout, {"sha256": "ab" * 32})
    return run


@pytest.mark.parametrize("layout", [Layout(2, 1, 1), Layout(1, 4, 1)])
def test_a_world_of_another_size_than_was_submitted(job_folder, layout, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "PMI", "OMPI_"))]:
        monkeypatch.delenv(name)
    run = prepared(job_folder, layout)
    with pytest.raises(WorldError, match=rf"for {layout.world_size} ranks, and 1 started") as caught:
        main.train(run, World())
    assert caught.value.hint
    known = json.loads(run.provenance.read_text())
    assert (known["complete"], known["image"], known["data"]) == (False, {"sha256": "ab" * 32}, {})
    assert known["submission"]["nodes"] == layout.nodes
    assert known["versions"]["python"] == sys.version.split()[0]


def test_a_rank_other_than_the_first_writes_none(job_folder):
    run = prepared(job_folder, Layout(1, 2, 1))
    submission = json.loads(run.submission.read_text())
    main.Provenance(run, World(rank=1, world_size=2, local_rank=1, local_size=2), submission).complete("x")
    assert not run.provenance.exists()


def test_a_model_that_cannot_be_built_leaves_what_was_known(job_folder):
    (job_folder / "model.py").write_text("def build(): raise RuntimeError('no luck')\n")
    code = "import h5py, numpy as np\nwith h5py.File('data.h5', 'w') as f: f['images'], f['labels'] = np.ones((16, 2)), np.ones(16)"
    subprocess.run([sys.executable, "-c", code], cwd=job_folder, check=True)
    (job_folder / "train.yaml").write_text((job_folder / "train.yaml").read_text() + CPU)
    words = [sys.executable, "-m", "hpcutils", "run", "train.yaml"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI", "OMPI_"))}
    environ["HPCUTILS_NODE_CACHE"] = str(job_folder / "cache")
    done = subprocess.run(words, cwd=job_folder, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, "no luck" in done.stderr) == (9, True), done.stderr
    (run,) = (job_folder / "runs").iterdir()
    known = json.loads((run / "provenance.json").read_text())
    submission = json.loads((run / "submission.json").read_text())
    assert known["complete"] is False
    assert known["code_sha256"] == submission["code_sha256"]
    assert [len(digest) for digest in known["data"].values()] == [64]
    assert {"hpcutils", "python", "tensorflow", "keras", "numpy", "h5py", "hdf5", "mpi"} <= set(known["versions"])
