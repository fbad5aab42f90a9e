"""Training on data read in windows: stopped in the middle of an epoch, gone on with by worlds of other sizes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from starts import lines, new_run, start

from hpcutils.rundir import RunDirectory

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
        done = start(run, ranks, f"stop={step}")
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


def test_without_mpi_in_threads_all_of_it_is_called_in_the_main_one(job_file):
    """Where MPI takes calls of one thread at a time, windows are decoded, and waited for, by the thread that runs the steps."""
    run = new_run(job_file, "serialized", 2)
    done = start(run, 2, "level=serialized", "main_thread=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(line["read"], line["chunks_read"], line["coverage"]) for line in lines(run)] == [("window", 1.0, "exact")] * 2
    done = start(new_run(job_file, "multiple", 2), 2, "main_thread=1")
    assert "was called in hpcutils-" in done.stderr, "the guard sees threads"


def test_a_sample_that_is_lost_ends_the_job(job_file):
    done = start(new_run(job_file, "lossy", 2), 2, "lose=1")
    assert done.returncode == 5, done.stderr[-3000:]
    assert "the ranks took 5001 samples of 5001, and not each exactly once" in done.stderr


def change(run: RunDirectory, part: str, **values: object) -> None:
    """Change the resolved job of a run."""
    resolved = json.loads(run.job.read_text())
    resolved[part] |= values
    run.job.write_text(json.dumps(resolved))


def take_notes(run: RunDirectory) -> list[list]:
    """Return what all ranks wrote of the batches that they used, epoch, step and samples, and remove it."""
    files = list(run.path.glob("seen-*.jsonl"))
    notes = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    for file in files:
        file.unlink()
    return notes


def killed_at(run: RunDirectory, ranks: int, step: int) -> tuple[int, list[list]]:
    """Start a run, whose last rank is killed; return the step that it began with, and the notes."""
    done = start(run, ranks, f"kill={step}")
    assert done.returncode not in (0, 75), done.stderr[-3000:]
    assert "signal 9" in done.stderr
    return began_with(done.stderr), take_notes(run)


def began_with(log: str) -> int:
    found = re.search(r"going on with step (\d+) of epoch 1", log)
    return int(found[1]) - 1 if found else 0


@pytest.mark.parametrize("steps", [(17, 41), (3, 66), (29, 30)])
def test_killed_and_gone_on_with_by_four_two_and_three_ranks(job_file, steps):
    """A rank dies without a word at some step: what counts of each run is exact, and together it is the dataset."""
    run = new_run(job_file, f"killed-{steps[0]}", 4)
    change(run, "checkpoints", every_steps=7)
    change(run, "training", epochs=1)
    first, notes = killed_at(run, 4, steps[0])
    second, more = killed_at(run, 2, steps[1])
    assert (first, second) == (0, steps[0] // 7 * 7)
    done = start(run, 3)
    assert done.returncode == 0, done.stderr[-3000:]
    third, rest = began_with(done.stderr), take_notes(run)
    assert third == max(steps) // 7 * 7
    counted = [note for note in notes if note[1] < second]
    counted += [note for note in more if second <= note[1] < third]
    assert {note[1] for note in rest} == set(range(third, 79))
    samples = [sample for _, _, rows in counted + rest for sample in rows]
    assert sorted(samples) == list(range(5001))
    assert [(line["coverage"], line["samples"]) for line in lines(run)] == [("exact", 5001)]


def test_another_data_set_cannot_go_on(job_file):
    run = new_run(job_file, "other", 1)
    assert start(run, 1, "stop=5").returncode == 75
    change(run, "training", batch_size=32)
    done = start(run, 1)
    assert done.returncode == 5
    assert "batch_size was 64 and is 32" in done.stderr


def test_between_epochs_the_batch_size_may_change_and_the_seed_may_not(job_file):
    run = new_run(job_file, "between", 1)
    change(run, "training", epochs=1)
    assert start(run, 1).returncode == 0
    change(run, "training", epochs=2, seed=8)
    done = start(run, 1)
    assert done.returncode == 5
    assert "cannot go on with epoch 2: seed was 7 and is 8" in done.stderr
    change(run, "training", seed=7, batch_size=100)
    done = start(run, 1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "from epoch 2 on batches have 100 samples; they had 64" in done.stderr
    assert [(line["epoch"], line["steps"], line["coverage"]) for line in lines(run)] == [(1, 79, "exact"), (2, 51, "exact")]
    next(run.checkpoints.glob("epoch-0002.json")).unlink()
    done = start(run, 1)
    assert done.returncode == 5
    assert "remove this checkpoint" in done.stderr
