"""Training without Slurm and containers: in one process, and over MPI ranks of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "jobs" / "digits" / "train.yaml"


def train(folder: Path, *words: str) -> tuple[dict, list[dict]]:
    done = subprocess.run(
        [sys.executable, "-m", "hpcutils", "run", str(DIGITS), "--json", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    return result, [json.loads(line) for line in (Path(result["path"]) / "metrics.jsonl").read_text().splitlines()]


def held_out() -> tuple[np.ndarray, np.ndarray]:
    with h5py.File(DIGITS.parent / "digits.h5") as file:
        return file["images"][1437:].astype("float32") / 16, np.eye(10)[file["labels"][1437:]]


def evaluate(path: Path, images: np.ndarray, labels: np.ndarray) -> list[float]:
    import keras

    return keras.models.load_model(path).evaluate(images, labels, batch_size=len(images), verbose=0)


def test_in_this_process(tmp_path):
    result, lines = train(tmp_path)
    assert result["accuracy"] >= 0.96
    assert (result["world_size"], result["replicas"], result["coverage"], result["reducer"]) == (1, 1, "exact", "none")
    assert [line["samples"] for line in lines] == [1437] * 14
    # Keras' own figures, from the saved model and the held-out samples in one batch, without padding and weights.
    images, labels = held_out()
    loss, accuracy = evaluate(Path(result["path"]) / "model.keras", images, labels)
    assert (lines[-1]["val_loss"], lines[-1]["val_accuracy"]) == (pytest.approx(loss, abs=1e-5), pytest.approx(accuracy, abs=1e-6))


@pytest.mark.mpi
def test_ranks_and_devices_train_on_the_same_batches(tmp_path):
    alone = train(tmp_path, "--epochs", "1")[1]
    for words in (("--ranks", "2"), ("--ranks", "3", "--gpus", "6")):
        result, lines = train(tmp_path, "--epochs", "1", *words)
        assert result["world_size"] == int(words[1])
        assert result["reducer"] != "none"
        for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
            assert lines[0][name] == pytest.approx(alone[0][name], abs=1e-4), (words, name)


@pytest.mark.mpi
def test_a_failing_rank_ends_the_others_with_its_code(tmp_path):
    job = tmp_path / "job"
    job.mkdir()
    for name in ("train.yaml", "make_data.py"):
        (job / name).write_text((DIGITS.parent / name).read_text())
    model = (DIGITS.parent / "model.py").read_text()
    lines = (
        "def broken():",
        "    import os",
        '    if os.environ["OMPI_COMM_WORLD_RANK"] == "1":',
        '        raise RuntimeError("no luck")',
    )
    wrong = "\n\n" + "\n".join(lines) + "\n    return build()\n"
    (job / "model.py").write_text(model + wrong)
    text = (job / "train.yaml").read_text().replace("model.py:build", "model.py:broken").replace("args: {filters: 32}", "args: {}")
    (job / "train.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "hpcutils", "run", "train.yaml", "--ranks", "2"],
        cwd=job,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 9
    assert "error: rank 1: RuntimeError: no luck" in done.stderr


def test_summary_and_plot_of_a_job(tmp_path):
    shown = subprocess.run([sys.executable, "-m", "hpcutils", "summary", str(DIGITS)], capture_output=True, text=True, check=True)
    assert "conv2d" in shown.stdout
    assert "Total params" in shown.stdout
    subprocess.run(
        [sys.executable, "-m", "hpcutils", "plot", str(DIGITS), "-o", "net.svg"], cwd=tmp_path, capture_output=True, check=True
    )
    assert "conv2d" in (tmp_path / "net.svg").read_text()


CUSTOM = """
import keras


class Doubling(keras.layers.Layer):
    def call(self, x):
        return 2 * x


def cubic(x):
    return x**3


def shrink(weights):
    return 1e-4 * keras.ops.sum(keras.ops.abs(weights))


def scale(batch):
    return batch.astype("float32") / 16.0


def build():
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Flatten()(inputs)
    x = keras.layers.Dense(16, activation="my_cubic", kernel_regularizer="my_shrink")(Doubling()(x))
    return keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x))
"""


def hpcutils(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hpcutils", *words], cwd=folder, capture_output=True, text=True, check=False)


def test_a_job_names_custom_objects_and_so_do_summary_and_plot(tmp_path):
    """The names stand in train.yaml alone: the model is built with them, saved, and read again by them."""
    job = tmp_path / "job"
    job.mkdir()
    (job / "make_data.py").write_text((DIGITS.parent / "make_data.py").read_text())
    (job / "model.py").write_text(CUSTOM)
    objects = "custom_objects: {my_cubic: 'model.py:cubic', my_shrink: 'model.py:shrink', Doubling: 'model.py:Doubling'}"
    text = (DIGITS.parent / "train.yaml").read_text().replace("args: {filters: 32}", objects)
    assert objects in text
    (job / "train.yaml").write_text(text)
    done = hpcutils(job, "run", "train.yaml", "--epochs", "1", "--json")
    assert done.returncode == 0, done.stderr
    saved = Path(json.loads(done.stdout.splitlines()[-1])["path"]) / "model.keras"

    # Elsewhere the names are given on the command line: what the file knows is the functions' own names.
    named = [f"{job}/model.py:{name}" for name in ("Doubling", "cubic")] + [f"shrink={job}/model.py:shrink"]
    words = [word for name in named for word in ("--custom-objects", name)]
    shown = hpcutils(tmp_path, "summary", str(saved), *words)
    assert shown.returncode == 0, shown.stderr
    assert "Doubling" in shown.stdout
    drawn = hpcutils(tmp_path, "plot", str(saved), "-o", "net.dot", *words)
    assert drawn.returncode == 0, drawn.stderr
    assert "Doubling" in (tmp_path / "net.dot").read_text()
