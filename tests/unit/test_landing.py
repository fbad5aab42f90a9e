"""Segments that do not get to the disk: whatever the reason, it is told, and nothing is published or waited for."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest
from staging_disk import published
from staging_samples import left_in, make_set, stage_set, tree_of

from hpcutils.errors import DataError
from hpcutils.staging import landing, store
from hpcutils.staging.items import Item
from hpcutils.staging.landing import Follower, Landing
from hpcutils.staging.load import Load, Pool
from hpcutils.staging.segments import Piece, Segment
from hpcutils.staging.stage import stage

ERRORS = {"a value": ValueError("embedded null byte"), "memory": MemoryError(), "the disk": OSError(28, "No space left on device")}


def break_writing(monkeypatch, error: BaseException, at: int) -> None:
    """Let the write number `at` of this process fail."""
    honest, count, lock = Landing._put, [0], threading.Lock()

    def put(self: Landing, piece: Piece, data: memoryview) -> None:
        with lock:
            count[0] += 1
            now = count[0] == at
        if now:
            raise error
        honest(self, piece, data)

    monkeypatch.setattr(Landing, "_put", put)


@pytest.mark.parametrize("at", [1, 4, 13])
@pytest.mark.parametrize("error", ERRORS)
def test_a_lost_write_of_a_dataset_is_told(tmp_path, monkeypatch, error, at):
    source, manifest = make_set(tmp_path)
    with monkeypatch.context() as patch:
        break_writing(patch, ERRORS[error], at)
        with pytest.raises(DataError, match="cannot write segment"):
            stage_set(manifest, source, tmp_path / "cache")
    assert published(tmp_path / "cache") == []
    assert tree_of(stage_set(manifest, source, tmp_path / "cache").files) == tree_of(source)
    assert left_in(tmp_path / "cache") == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("error", ERRORS)
def test_a_lost_write_of_one_file_is_told(tmp_path, monkeypatch, error, at):
    (tmp_path / "x").write_bytes(body := os.urandom(9 << 20))
    item = Item("x", str(tmp_path / "x"), hashlib.sha256(body).hexdigest())
    with monkeypatch.context() as patch:
        break_writing(patch, ERRORS[error], at)
        with pytest.raises(DataError, match="cannot write segment"):
            stage(item, tmp_path / "cache")
    assert published(tmp_path / "cache") == []
    assert stage(item, tmp_path / "cache").path.read_bytes() == body


def test_a_segment_that_nobody_wrote_down_is_not_published(tmp_path, monkeypatch):
    source, manifest = make_set(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Landing, "_note", lambda self, load: None)
        with pytest.raises(DataError, match=r"segment 0 .* never got to"):
            stage_set(manifest, source, tmp_path / "cache")
    assert published(tmp_path / "cache") == []


def test_what_hashes_behind_the_writing_tells_every_error(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(100))
    monkeypatch.setattr(landing, "HASH_BLOCK_BYTES", -1)
    with pytest.raises(DataError, match="cannot hash"):
        Follower(tmp_path / "x", 100, 100, frozenset({0})).digest()


def test_a_full_disk_under_the_sidecar(tmp_path):
    """`/dev/full` refuses every write(2) with ENOSPC."""
    (tmp_path / "files").mkdir()
    (tmp_path / store.SEGMENTS).symlink_to("/dev/full")
    segment = Segment(0, 3, None, (Piece("x", 3, 0, 0, 3),))
    with Landing(tmp_path) as land:
        land.land(Load(segment, "0" * 32, Pool(1, 3).take()))
        with pytest.raises(DataError, match=r"cannot write segment 0 .* No space left on device"):
            land.wait()


def test_a_full_disk_under_the_sidecar_of_a_dataset(tmp_path, monkeypatch):
    source, manifest = make_set(tmp_path)
    honest = store.write_finished

    def begun(folder, *words) -> None:
        honest(folder, *words)
        (folder / store.SEGMENTS).unlink()
        (folder / store.SEGMENTS).symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_finished", begun)
        with pytest.raises(DataError, match="No space left on device"):
            stage_set(manifest, source, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").rglob(".*")] == []
    assert tree_of(stage_set(manifest, source, tmp_path / "cache").files) == tree_of(source)


def test_a_disk_that_refuses_to_close(tmp_path, monkeypatch):
    source, manifest = make_set(tmp_path)
    honest = os.close

    def close(descriptor: int) -> None:
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        honest(descriptor)
        if name.endswith(("large.h5", store.SEGMENTS)) and str(tmp_path / "cache") in name:
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(landing.os, "close", close)
        with pytest.raises(DataError, match="Input/output error"):
            stage_set(manifest, source, tmp_path / "cache")
    assert published(tmp_path / "cache") == []
