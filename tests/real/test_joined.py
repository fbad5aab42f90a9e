"""A job over several files: trained in windows over MPI ranks, exactly as over one file."""

from __future__ import annotations

import subprocess
import sys

import pytest
from test_resume import ROOT, lines, new_run, start

# All samples in `all.h5`; the same in two files each, cut at a chunk's border and inside of a chunk; labels in a file of their own.
MAKE = """
import h5py
import numpy as np
from sklearn.datasets import load_digits

digits = load_digits()
picked = np.random.default_rng(0).integers(0, 1797, 5600)
images = (digits.images[picked, :, :, None] * 255 / 16).astype("uint8")


def write(name, rows):
    with h5py.File(name, "w") as file:
        file.create_dataset("images", data=rows, chunks=(50, 8, 8, 1), compression="gzip", shuffle=True)


for name, cut in (("even", 1000), ("ragged", 1017)):
    write(f"{name}-1.h5", images[:cut])
    write(f"{name}-2.h5", images[cut:])
write("all.h5", images)
with h5py.File("labels.h5", "w") as file:
    file["labels"] = digits.target[picked].astype("uint8")
"""
IMAGES = {
    "all": "all.h5:images",
    "even": "[even-1.h5:images, even-2.h5:images]",
    "ragged": "[ragged-1.h5:images, ragged-2.h5:images]",
}

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    """What `metrics.jsonl` says of one epoch of each job."""
    folder = tmp_path_factory.mktemp("joined")
    digits = ROOT / "jobs" / "digits"
    (folder / "model.py").write_text((digits / "model.py").read_text())
    (folder / "make_data.py").write_text(MAKE)
    subprocess.run([sys.executable, "make_data.py"], cwd=folder, check=True)
    names = ["all", *(f"{name}-{number}" for name in ("even", "ragged") for number in (1, 2)), "labels"]
    files = "".join(f"    - path: {name}.h5\n" for name in names)
    text = "\n".join(line for line in (digits / "train.yaml").read_text().splitlines() if not line.strip().startswith("sha256:"))
    text = text.replace("    - path: digits.h5\n", files).replace("1437", "5001").replace("epochs: 14", "epochs: 1") + "\n"
    found = {}
    for name, images in IMAGES.items():
        job = folder / f"{name}.yaml"
        job.write_text(text.replace("x: images", f"x: {images}").replace("y: labels", "y: labels.h5:labels"))
        run = new_run(job, name, 2)
        done = start(run, 2)
        assert done.returncode == 0, done.stderr[-3000:]
        (found[name],) = lines(run)
    return found


@pytest.mark.parametrize("name", list(IMAGES))
def test_every_sample_and_every_chunk_once(runs, name):
    said = runs[name]
    assert (said["read"], said["samples"], said["coverage"], said["chunks_read"]) == ("window", 5001, "exact", 1.0)


def test_files_that_end_with_a_chunk_are_as_one(runs):
    """The same chunks, so the same batches: the same figures, up to the order of sums."""
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        assert runs["even"][name] == pytest.approx(runs["all"][name], abs=1e-3), name
