"""Training on data read in windows: stopped in the middle of an epoch, gone on with by worlds of other sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from starts import lines, new_run, start

ROOT = Path(__file__).parents[2]

MAKE = """
import h5py, numpy as np
from sklearn.datasets import load_digits
digits = load_digits()
picked = np.random.default_rng(0).integers(0, 1797, 5748)
with h5py.File("digits.h5", "w") as file:
    images = digits.images[picked, :, :, None].astype("uint8")
    file.create_dataset("images", data=images, chunks=(50, 8, 8, 1), compression="gzip", shuffle=True)
    file["labels"] = digits.target[picked].astype("uint8")
"""

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def job_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    text = (ROOT / "jobs" / "digits" / "train.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.strip().startswith("sha256:")]
    (folder / "train.yaml").write_text("\n".join(lines).replace("1437", "5001").replace("epochs: 14", "epochs: 2") + "\n")
    (folder / "model.py").write_text((ROOT / "jobs" / "digits" / "model.py").read_text())
    (folder / "make_data.py").write_text(MAKE)
    subprocess.run([sys.executable, "make_data.py"], cwd=folder, check=True)
    return folder / "train.yaml"


def test_stopped_and_gone_on_with_by_four_two_and_three_ranks(job_file):
    whole = new_run(job_file, "whole", 2)
    done = start(whole, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = lines(whole)
    assert [(line["read"], line["chunks_read"], line["coverage"]) for line in expected] == [("window", 1.0, "exact")] * 2
    assert all(line["wait_s"] < line["seconds"] for line in expected)

    run = new_run(job_file, "stopped", 4)
    for ranks, step in ((4, 17), (2, 41)):
        done = start(run, ranks, str(step))
        assert f"stopping after step {step} of epoch 1" in done.stderr, done.stderr[-3000:]
        assert done.returncode == 75
        assert [path.suffix for path in sorted(run.checkpoints.glob(f"epoch-0000-step-{step:08d}.*"))] == [".json", ".keras"]
    done = start(run, 3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on with step 42 of epoch 1" in done.stderr
    assert [line["coverage"] for line in lines(run)] == ["exact", "exact"]
    for one, other in zip(expected, lines(run), strict=True):
        # The same batches, so the same figures for the whole epoch, up to rounding that training makes more of.
        for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
            assert one[name] == pytest.approx(other[name], abs=0.02), name


def test_a_damaged_chunk_ends_the_run_with_the_code_of_data(job_file):
    data = job_file.parent / "digits.h5"
    whole = data.read_bytes()
    with h5py.File(data) as file:
        offset = file["images"].id.get_chunk_info(40).byte_offset
    data.write_bytes(whole[: offset + 4] + b"\xff" * 16 + whole[offset + 20 :])
    try:
        done = start(new_run(job_file, "damaged", 1), 1)
    finally:
        data.write_bytes(whole)
    assert done.returncode == 5, done.stderr[-3000:]
    assert "dataset /images, chunk at (2000, 0, 0, 0)" in done.stderr


def test_another_data_set_cannot_go_on(job_file):
    run = new_run(job_file, "other", 1)
    assert start(run, 1, "5").returncode == 75
    resolved = json.loads(run.job.read_text())
    resolved["training"]["batch_size"] = 32
    run.job.write_text(json.dumps(resolved))
    done = start(run, 1)
    assert done.returncode == 5
    assert "batch_size was 64 and is 32" in done.stderr
