"""Training that begins while its data arrives: from a server that gives the rest only when the first epoch is over."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py
import numpy as np
import pytest

# The server is shared with the unit tests, which are not a package.
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from servers import Handler, Quirk, etag_of, honest, serving

from hpcutils.launch.local import LOCAL_ENVIRONMENT, find_mpirun, local_job
from hpcutils.launch.request import Layout
from hpcutils.launch.runs import prepare
from hpcutils.rundir import RunDirectory
from hpcutils.specs.job import load_job
from hpcutils.staging import cache
from hpcutils.staging.store import Place, is_intact, leftovers

pytestmark = pytest.mark.mpi
IN_WINDOWS = Path(__file__).with_name("entry_in_windows.py")
ROWS = 44_000

MODEL = """
import keras

def build():
    image = keras.Input((8, 8, 1))
    return keras.Model(image, keras.layers.Dense(10, activation="softmax")(keras.layers.Flatten()(image)))
"""
JOB = """
name: overlap
data:
  files: [{{url: {url}, sha256: {sha256}}}]
  x: images
  y: labels
  stage: {stage}
  split: {{train: [0, 42000], validation: [42000, null]}}
model: {{function: model.py:build}}
training: {{epochs: {epochs}, batch_size: 200, loss: sparse_categorical_crossentropy, metrics: [accuracy], seed: 3}}
resources: {{devices: simulated}}
staging: {{cache: {cache}}}
"""


@pytest.fixture(scope="module")
def body(tmp_path_factory) -> bytes:
    """A file of 9 MiB, little less than its samples: three segments, chunks of 100 samples."""
    path = tmp_path_factory.mktemp("data") / "set.h5"
    random = np.random.default_rng(1)
    with h5py.File(path, "w") as file:
        images = random.random((ROWS, 8, 8, 1), "f4")
        file.create_dataset("images", data=images, chunks=(100, 8, 8, 1), compression="gzip", shuffle=True)
        file["labels"] = random.integers(0, 10, ROWS).astype("u1")
    return path.read_bytes()


def held_back(folder: Path) -> Quirk:
    """Give parts at once; of a whole file the first half, and the rest when a run in `folder` has written of an epoch."""

    def quirk(handler: Handler, body: bytes) -> None:
        # Who asks for a part reads through.
        if not handler.headers.get("Range", "-").endswith("-"):
            honest(handler, body)
            return
        handler.head(200, Content_Length=len(body), ETag=etag_of(body))
        half, deadline_s = len(body) // 2, time.monotonic() + 500
        handler.wfile.write(body[:half])
        while not any(path.stat().st_size for path in folder.rglob("metrics.jsonl")) and time.monotonic() < deadline_s:
            # A byte now and then: a silent server counts as lost.
            handler.wfile.write(body[half : half + 1])
            half += 1
            time.sleep(0.2)
        handler.wfile.write(body[half:])

    return quirk


@contextmanager
def server(folder: Path, body: bytes) -> Iterator[str]:
    with serving() as site:
        site.repeat_last = True
        yield site.put("/set.h5", body, held_back(folder))


def new_run(
    folder: Path, url: str, sha256: str, stage: str, ranks: int, epochs: int = 2, second: tuple[str, str] | None = None
) -> RunDirectory:
    """Prepare a run on the file of `url`; with `second`, another URL and digest, on the rows of both."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(MODEL)
    text = JOB.format(url=url, sha256=sha256, stage=stage, epochs=epochs, cache=folder / "cache")
    if second is not None:
        text = text.replace("}]\n", f"}}, {{url: {second[0]}, sha256: {second[1]}}}]\n", 1)
        for name in ("images", "labels"):
            text = text.replace(f": {name}\n", f": [set.h5:{name}, more.h5:{name}]\n")
    (folder / "train.yaml").write_text(text)
    run = RunDirectory(folder / "runs" / stage)
    prepare(run, local_job(load_job(folder / "train.yaml"), ranks, None), folder, Layout(1, ranks, 1), None)
    return run


def start(run: RunDirectory, ranks: int, *program: str, words: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    argv = [find_mpirun(), "-n", str(ranks), *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    return subprocess.run(
        [*argv, sys.executable, *program, str(run.path), *words],
        env=os.environ | LOCAL_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def facts(run: RunDirectory) -> tuple[list[dict], dict, dict]:
    """Return the epochs, the result, and what staging took."""
    epochs = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    (staging,) = json.loads(run.provenance.read_text())["staging"]
    return epochs, json.loads(run.result.read_text()), staging


@pytest.mark.parametrize("program, mode", [(("-m", "hpcutils.train.entry"), "memory"), ((str(IN_WINDOWS),), "window")])
def test_an_epoch_is_trained_before_the_rest_arrives_with_the_same_result(tmp_path, body, program, mode):
    sha256 = hashlib.sha256(body).hexdigest()
    with serving() as site:
        before = new_run(tmp_path / "one", site.put("/set.h5", body), sha256, "before", 2)
        done = start(before, 2, *program)
        assert done.returncode == 0, done.stderr[-3000:]
    with server(tmp_path / "other", body) as url:
        overlap = new_run(tmp_path / "other", url, sha256, "overlap", 2)
        done = start(overlap, 2, *program)
        assert done.returncode == 0, done.stderr[-3000:]
    expected, result, _ = facts(before)
    epochs, other, staging = facts(overlap)
    assert [line["read"] for line in (*expected, *epochs)] == [mode] * 4
    assert other["weights_sha256"] == result["weights_sha256"]
    for name in ("loss", "accuracy", "val_loss", "val_accuracy", "coverage"):
        assert [line[name] for line in epochs] == [line[name] for line in expected]
    # The server gave the rest when the first epoch was written down.
    assert staging["steps_meanwhile"] >= epochs[0]["steps"]
    assert 0 < staging["read_through_bytes"] < 2 * len(body)
    assert (staging["origin_bytes"], staging["digest"]) == (len(body), sha256)
    root = tmp_path / "other" / "cache"
    (kept,) = cache.kept_in(root)
    assert is_intact(Place(root, kept.kind, kept.key).entry)
    assert cache.verify(root, kept).wrong == ()
    assert f"staging ended after {staging['steps_meanwhile']} steps of training" in done.stderr
    assert "were read through to the source while it arrived; all of it proved right" in done.stderr


def test_lists_of_files_are_trained_on_while_they_arrive(tmp_path, body):
    """The rows of the file that is held back are followed by those of another, whose chunks have no filters."""
    with h5py.File(tmp_path / "more.h5", "w") as file:
        file.create_dataset("images", data=np.random.default_rng(2).random((1050, 8, 8, 1), "f4"), chunks=(100, 8, 8, 1))
        file["labels"] = np.arange(1050).astype("u1") % 10
    more = (tmp_path / "more.h5").read_bytes()
    found = {}
    for stage in ("before", "overlap"):
        folder = tmp_path / stage
        with serving() as site:
            site.repeat_last = True
            url = site.put("/set.h5", body, *([held_back(folder)] if stage == "overlap" else []))
            second = site.put("/more.h5", more), hashlib.sha256(more).hexdigest()
            run = new_run(folder, url, hashlib.sha256(body).hexdigest(), stage, 2, second=second)
            done = start(run, 2, str(IN_WINDOWS))
        assert done.returncode == 0, done.stderr[-3000:]
        epochs = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        staging = json.loads(run.provenance.read_text())["staging"]
        found[stage] = json.loads(run.result.read_text())["weights_sha256"], epochs, staging
    (weights, expected, _), (other, epochs, staging) = found.values()
    assert other == weights
    for name in ("loss", "val_loss", "coverage", "read", "chunks_read"):
        assert [line[name] for line in epochs] == [line[name] for line in expected], name
    assert [(line["read"], line["coverage"], line["chunks_read"]) for line in epochs] == [("window", "exact", 1.0)] * 2
    assert staging[0]["steps_meanwhile"] >= epochs[0]["steps"]
    assert staging[0]["read_through_bytes"] > 0


def test_a_wrong_byte_at_the_end_fails_the_job_and_publishes_nothing(tmp_path, body):
    sha256 = hashlib.sha256(body).hexdigest()
    wrong = body[:-1] + bytes([body[-1] ^ 1])
    with server(tmp_path, wrong) as url:
        run = new_run(tmp_path, url, sha256, "overlap", 2, epochs=2000)
        done = start(run, 2, "-m", "hpcutils.train.entry")
    assert done.returncode == 6, done.stderr[-3000:]
    failure = json.loads(run.failure.read_text())
    assert (failure["rank"], failure["exit_code"]) == (0, 6)
    assert "sha256 of the" in failure["message"]
    # At once, not at the end: all epochs would take many minutes.
    assert 1 <= len(run.metrics.read_text().splitlines()) < 1000
    assert not run.result.exists()
    assert not run.model.exists()
    assert cache.kept_in(tmp_path / "cache") == []
    with suppress(FileNotFoundError):
        assert [path.name for path in (tmp_path / "cache" / "sha256").iterdir() if not path.name.startswith(".")] == []


def test_a_run_that_stops_while_its_data_arrives_goes_on_with_what_has_landed(tmp_path, body):
    sha256 = hashlib.sha256(body).hexdigest()
    with serving() as site:
        site.repeat_last = True
        url = site.put("/set.h5", body, held_back(tmp_path))
        run = new_run(tmp_path, url, sha256, "overlap", 2)
        done = start(run, 2, str(IN_WINDOWS), words=("stop=20",))
        # The server would have held the rest back for minutes: nobody waited for it.
        assert done.returncode == 75, done.stderr[-3000:]
        assert "stopping after step 20 of epoch 1" in done.stderr
        assert cache.kept_in(tmp_path / "cache") == []
        assert len(leftovers(tmp_path / "cache", "sha256")) == 1
        run.stop.unlink()
        site.put("/set.h5", body)
        done = start(run, 2, str(IN_WINDOWS))
    assert done.returncode == 0, done.stderr[-3000:]
    epochs, result, staging = facts(run)
    assert [(line["epoch"], line["coverage"]) for line in epochs] == [(1, "exact"), (2, "exact")]
    assert result["weights_identical"]
    # The first segment of three was there.
    assert staging["origin_bytes"] == len(body) - (4 << 20)
    assert "going on with step 21 of epoch 1" in done.stderr


NODES = Path(__file__).with_name("overlap_ranks.py")


def leaders(nodes: int, folder: Path, body: bytes, **environ: str) -> tuple[list[dict], str]:
    """Return what each leader said, and the log."""
    (folder / "set.h5").write_bytes(body)
    argv = [find_mpirun(), "-n", str(nodes), *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    done = subprocess.run(
        [*argv, sys.executable, str(NODES), str(folder), hashlib.sha256(body).hexdigest()],
        env=os.environ | LOCAL_ENVIRONMENT | environ,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == nodes
    return said, done.stderr


def test_without_threads_data_is_staged_first(tmp_path, body):
    (tmp_path / "go").touch()
    said, log = leaders(2, tmp_path, body, MPI4PY_RC_THREAD_LEVEL="serialized")
    assert [(each["before"], each["read"]) for each in said] == [(True, True)] * 2
    assert "steps_meanwhile" not in said[0]["record"]
    assert log.count("MPI was not started for threads") == 1


@pytest.mark.parametrize("nodes", [2, 3])
def test_leaders_move_in_the_background_while_all_ranks_reduce(tmp_path, body, nodes):
    said, _ = leaders(nodes, tmp_path, body)
    for rank, each in enumerate(said):
        assert each["sum"] == each["reductions"] * nodes
        assert each["before"] is False
        assert each["read"] is True
        assert (each["record"]["origin_bytes"], each["record"]["received_bytes"]) == (len(body), len(body) * (nodes - 1))
        assert each["record"]["steps_meanwhile"] >= 50
        (kept,) = cache.kept_in(tmp_path / f"node{rank}")
        assert cache.verify(tmp_path / f"node{rank}", kept).wrong == ()
