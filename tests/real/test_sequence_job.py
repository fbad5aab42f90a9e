"""Jobs that train on a Sequence of their own: the same batches for any world and any workers, epochs alike everywhere, no hang."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import wait_until
from starts import lines, new_run, start

ROOT = Path(__file__).parents[2]
JOB = ROOT / "jobs" / "sequence"

# Beside the example's own module, which it imports: also in worker processes.
RECORDED = """
import os, signal, time
import pipeline

RANK = os.environ.get("OMPI_COMM_WORLD_RANK", "none")

class Recorded(pipeline.Digits):
    def note(self, what, index=-1):
        with open(f"{self.log}/{os.getpid()}", "a") as file:
            file.write(f"{RANK} {what} {self.epoch} {index}\\n")

    def __getitem__(self, index):
        self.note("make", index)
        if index == 17 and self.fault is not None:
            self.fault()
        return super().__getitem__(index)

    def on_epoch_end(self):
        super().on_epoch_end()
        self.note("end")

def recorded(files, rows, log, fault=None):
    batches = pipeline.training(files, rows)
    batches.__class__, batches.log, batches.fault = Recorded, log, fault and globals()[fault]
    os.makedirs(log, exist_ok=True)
    return batches

def kill():
    with open(__file__ + ".time", "w") as file:
        file.write(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)

def fail():
    raise ValueError("no luck")

def lopsided(files, rows, log):
    batches = recorded(files, rows, log)
    if RANK == "1":
        batches.images, batches.labels = batches.images[:-40], batches.labels[:-40]
    return batches
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(JOB / "make_data.py")], cwd=folder, check=True)
    return folder / "digits.npz"


@pytest.fixture
def folder(tmp_path, data) -> Path:
    for name in ("train.yaml", "pipeline.py", "model.py", "make_data.py"):
        (tmp_path / name).write_text((JOB / name).read_text())
    (tmp_path / data.name).hardlink_to(data)
    (tmp_path / "recorded.py").write_text(RECORDED)
    return tmp_path


def change(folder: Path, **data: str) -> None:
    """Give keys of `data`, written as in the file, other values or new lines."""
    text = (folder / "train.yaml").read_text()
    for key, value in data.items():
        line = next((line for line in text.splitlines() if line.startswith(f"  {key}:")), None)
        text = text.replace(line, f"  {key}: {value}") if line else text.replace("data:\n", f"data:\n  {key}: {value}\n")
    (folder / "train.yaml").write_text(text)


def train(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "hpcutils", "run", "train.yaml", "--json", *words]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def trained(folder: Path, *words: str) -> list[dict]:
    done = train(folder, "--epochs", "2", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    return [json.loads(line) for line in (Path(result["path"]) / "metrics.jsonl").read_text().splitlines()]


def notes(log: Path) -> dict[str, list[list[str]]]:
    """Return what each process noted."""
    return {path.name: [line.split() for line in path.read_text().splitlines()] for path in log.iterdir()}


def test_the_example_learns_in_this_process(folder):
    done = train(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["accuracy"] >= 0.93
    provenance = json.loads((Path(result["path"]) / "provenance.json").read_text())
    assert list(provenance["data"]) == ["digits.npz"]


def test_alone_with_processes_as_without(folder):
    by_threads = trained(folder)
    change(folder, use_processes="true")
    by_processes = trained(folder)
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        assert [line[name] for line in by_threads] == [pytest.approx(line[name], abs=1e-4) for line in by_processes]


@pytest.mark.mpi
def test_ranks_and_workers_train_on_the_same_batches(folder):
    alone = trained(folder)
    assert [(line["samples"], line["steps"], line["coverage"], line["read"]) for line in alone] == [
        (1437, 23, "exact", "threads")
    ] * 2

    change(folder, sequence="recorded.py:recorded")
    for ranks, processes in ((2, "false"), (3, "true")):
        log = folder / f"log-{ranks}"
        change(folder, args=f"{{rows: 16, log: {log}}}", use_processes=processes, validation_sequence="null")
        found = trained(folder, "--ranks", str(ranks))
        assert [line["coverage"] for line in found] == ["exact"] * 2
        assert [line["chunks_read"] for line in found] == [1.0] * 2
        for name in ("loss", "accuracy"):
            assert found[0][name] == pytest.approx(alone[0][name], abs=1e-4), (ranks, name)
        by_process = notes(log)
        own = {noted[0][0]: noted for noted in by_process.values() if noted[0][0] != "none"}
        assert sorted(own) == [str(rank) for rank in range(ranks)]
        ends = [[note[2] for note in noted if note[1] == "end"] for noted in own.values()]
        assert ends == [["1", "2"]] * ranks
        workers = [noted for noted in by_process.values() if noted[0][0] == "none"]
        assert len(workers) == (2 * ranks if processes == "true" else 0)
        # Each rank looks at the first and the last batch before the first epoch.
        made = [note for noted in by_process.values() for note in noted if note[1] == "make"]
        for epoch, looks in (("0", [0, 89] * ranks), ("1", [])):
            assert sorted(int(note[3]) for note in made if note[2] == epoch) == sorted([*range(90), *looks])


@pytest.mark.mpi
def test_stopped_in_an_epoch_and_gone_on_with_by_three_and_one_rank(folder):
    change(folder, sequence="recorded.py:recorded", validation_sequence="null", args=f"{{rows: 16, log: {folder / 'log'}}}")
    text = (folder / "train.yaml").read_text()
    (folder / "train.yaml").write_text(text.replace("epochs: 20", "epochs: 3"))
    whole = new_run(folder / "train.yaml", "whole", 2)
    done = start(whole, 2)
    assert done.returncode == 0, done.stderr[-3000:]

    change(folder, args=f"{{rows: 16, log: {folder / 'stopped'}}}", use_processes="true")
    run = new_run(folder / "train.yaml", "stopped", 2)
    for ranks, step in ((2, 9), (3, 16)):
        done = start(run, ranks, f"stop={step}", "epoch=1")
        assert f"stopping after step {step} of epoch 2" in done.stderr, done.stderr[-3000:]
        assert done.returncode == 75
    done = start(run, 1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on with step 17 of epoch 2" in done.stderr
    expected, found = lines(whole), lines(run)
    assert [line["coverage"] for line in found] == ["exact"] * 3
    for one, other in zip(expected, found, strict=True):
        # The pictures differ from epoch to epoch: only a copy that is at the same epoch gives the same figures.
        for name in ("loss", "accuracy"):
            assert one[name] == pytest.approx(other[name], abs=0.02), name
    # Each process that went on ended the first epoch before it made a batch of the second.
    for noted in notes(folder / "stopped").values():
        assert [note[2] for note in noted if note[1] == "end"] in (["1"], ["1", "2"], ["1", "2", "3"])


@pytest.mark.mpi
def test_a_worker_process_that_dies_ends_the_job_and_its_batch_is_named(folder):
    change(folder, sequence="recorded.py:recorded", validation_sequence="null", use_processes="true")
    change(folder, args=f"{{rows: 16, log: {folder / 'log'}, fault: kill}}")
    done = train(folder, "--ranks", "2")
    ended = time.time()
    assert done.returncode == 9, done.stderr[-3000:]
    assert "a worker process was killed by SIGKILL before batch 17 of recorded.py:recorded was made" in done.stderr
    (died,) = folder.glob("runs/*/code/recorded.py.time")
    assert ended - float(died.read_text()) < 30
    wait_until(lambda: not any(map(is_running, notes(folder / "log"))), 10, "nothing is left behind")


def is_running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.mpi
def test_a_batch_that_cannot_be_made_ends_the_job_and_is_named(folder):
    change(folder, sequence="recorded.py:recorded", validation_sequence="null")
    change(folder, args=f"{{rows: 16, log: {folder / 'log'}, fault: fail}}")
    done = train(folder, "--ranks", "2")
    assert done.returncode == 9, done.stderr[-3000:]
    assert "batch 17 of recorded.py:recorded: ValueError: no luck" in done.stderr
    assert "in fail" in done.stderr, "the traceback is in the log"


@pytest.mark.mpi
def test_ranks_that_see_other_data_are_an_error_and_no_hang(folder):
    change(folder, sequence="recorded.py:lopsided", validation_sequence="null", args=f"{{rows: 16, log: {folder / 'log'}}}")
    done = train(folder, "--ranks", "2")
    assert done.returncode == 5, done.stderr[-3000:]
    assert "recorded.py:lopsided: rank 1 has 88 batches of 16 rows, 5 in the last" in done.stderr
    assert "rank 0 has 90 batches of 16 rows, 13 in the last" in done.stderr


def test_summary_and_plan_of_a_job_with_a_sequence(folder):
    for words, said in ((["summary", "train.yaml"], "conv2d"), (["plot", "train.yaml", "-o", "net.svg"], "")):
        done = subprocess.run([sys.executable, "-m", "hpcutils", *words], cwd=folder, capture_output=True, text=True, check=True)
        assert said in done.stdout
    assert "conv2d" in (folder / "net.svg").read_text()
