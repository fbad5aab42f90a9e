"""A disk that refuses, at each step of staging: never a wrong file under a name, no hang, nothing left by the next run.

Each step is a test of its own. How many there are depends a little on the threads that write: a step beyond the last one does not
come, and the run must succeed then.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from staging_disk import BEGINNINGS, full_under, published, refuse, watched
from staging_samples import left_in, make_set, stage_set, tree_of

from hpcutils.errors import DataError
from hpcutils.staging.items import Item
from hpcutils.staging.stage import stage

# Beginning, what the disk says, the fewest steps that there may be, and more than there are.
DATASETS = {
    "nothing there": (errno.ENOSPC, 60, 84),
    "a partial": (errno.EIO, 30, 52),
    "a changed dataset": (errno.ENOSPC, 35, 56),
}
ONE_FILE = (12, 34)


def attempt(folder: Path, beginning: str, step: int) -> int:
    """Let a step of staging a dataset fail; return how many there were."""
    number = DATASETS[beginning][0]
    source, manifest = make_set(folder)
    wanted, root = tree_of(source), folder / "cache"
    BEGINNINGS[beginning](source, manifest, root)
    with watched(root, step, refuse(number)) as disk:
        try:
            stage_set(manifest, source, root)
            failed = False
        except DataError as exc:
            assert os.strerror(number) in exc.message
            failed = True
    assert failed or published(root) == [wanted]
    if beginning != "a changed dataset":
        assert published(root) in ([], [wanted])
    assert tree_of(stage_set(manifest, source, root).files) == wanted
    assert published(root) == [wanted]
    assert left_in(root) == []
    return disk.count


STEPS = [(beginning, step) for beginning, (_, _, last) in DATASETS.items() for step in range(1, last + 1)]


@pytest.mark.parametrize("beginning, step", STEPS, ids=[f"{beginning}, step {step}" for beginning, step in STEPS])
def test_a_dataset(tmp_path, beginning, step):
    attempt(tmp_path, beginning, step)


@pytest.mark.parametrize("beginning", DATASETS)
def test_all_steps_of_a_dataset_are_tried(tmp_path, beginning):
    _, fewest, last = DATASETS[beginning]
    assert fewest <= attempt(tmp_path, beginning, 0) <= last


def attempt_one_file(folder: Path, known: bool, step: int) -> int:
    body, root = os.urandom(100_000), folder / "cache"
    (folder / "x").write_bytes(body)
    item = Item("x", str(folder / "x"), hashlib.sha256(body).hexdigest() if known else None)
    with watched(root, step, refuse(errno.ENOSPC)) as disk:
        try:
            stage(item, root)
        except DataError as exc:
            assert "No space left" in exc.message
    assert published(root) in ([], [{"x": body}])
    assert stage(item, root).path.read_bytes() == body
    assert left_in(root) == []
    return disk.count


@pytest.mark.parametrize("step", range(1, ONE_FILE[1] + 1))
@pytest.mark.parametrize("known", [True, False], ids=["with sha256", "without"])
def test_one_file(tmp_path, known, step):
    attempt_one_file(tmp_path, known, step)


@pytest.mark.parametrize("known", [True, False], ids=["with sha256", "without"])
def test_all_steps_of_one_file_are_tried(tmp_path, known):
    assert ONE_FILE[0] <= attempt_one_file(tmp_path, known, 0) <= ONE_FILE[1]


@pytest.mark.parametrize("beginning", ["nothing there", "a partial"])
@pytest.mark.parametrize("what", ["segments", "complete.jsonl", "manifest.jsonl"])
def test_a_disk_that_is_full_when_bytes_are_written(tmp_path, monkeypatch, what, beginning):
    """The file can be made, and write(2) says ENOSPC: `/dev/full` is in its place."""
    source, manifest = make_set(tmp_path)
    wanted, root = tree_of(source), tmp_path / "cache"
    BEGINNINGS[beginning](source, manifest, root)
    with monkeypatch.context() as patch:
        full_under(patch, what)
        with pytest.raises(DataError, match="No space left on device"):
            stage_set(manifest, source, root)
    assert published(root) == []
    assert tree_of(stage_set(manifest, source, root).files) == wanted
    assert left_in(root) == []


@pytest.mark.parametrize("what", ["segments", "complete.jsonl", "manifest.jsonl"])
def test_a_disk_that_is_full_when_bytes_of_one_file_are_written(tmp_path, monkeypatch, what):
    (tmp_path / "x").write_bytes(body := os.urandom(100_000))
    item = Item("x", str(tmp_path / "x"), hashlib.sha256(body).hexdigest())
    with monkeypatch.context() as patch:
        full_under(patch, what)
        with pytest.raises(DataError, match="No space left on device"):
            stage(item, tmp_path / "cache")
    assert published(tmp_path / "cache") == []
    assert stage(item, tmp_path / "cache").path.read_bytes() == body
    assert left_in(tmp_path / "cache") == []
