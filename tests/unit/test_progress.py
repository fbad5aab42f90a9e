"""What a transfer tells of itself: bytes, rate, nodes, time left."""

from __future__ import annotations

import io

import pytest
from staging_disk import begin_partial
from staging_samples import make_set, stage_set

from hpcutils.staging import move, progress
from hpcutils.staging.progress import Lines

MIB = 1 << 20


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_what_was_there_already_does_not_count_into_the_rate(clock):
    lines = Lines("x", io.StringIO())
    lines.begin(90 * MIB)
    clock[0] += 2
    lines.update(92 * MIB, 100 * MIB)
    assert lines.state() == "92.0 of 100.0 MiB (92%), 1.0 MiB/s, 8 s left"


def test_nodes_that_are_done_are_told(clock):
    lines = Lines("x", io.StringIO())
    lines.begin(0)
    clock[0] += 1
    lines.update(1 * MIB, 4 * MIB, "1 of 3 nodes")
    assert lines.state() == "1.0 of 4.0 MiB (25%), 1.0 MiB/s, 1 of 3 nodes, 3 s left"


class Noted:
    """Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.begun, self.told = 0, []

    def begin(self, done_bytes: int) -> None:
        self.begun = done_bytes

    def update(self, done_bytes: int, total_bytes: int | None, also: str = "") -> None:
        self.told.append((done_bytes, total_bytes, also))

    def close(self) -> None:
        pass


def test_a_dataset_that_is_taken_up_begins_where_it_was(tmp_path, monkeypatch):
    source, manifest = make_set(tmp_path)
    begin_partial(source, manifest, tmp_path / "cache")
    noted = Noted()
    monkeypatch.setattr(move.Move, "_progress", lambda self: noted)
    outcome = stage_set(manifest, source, tmp_path / "cache")
    assert 0 < noted.begun == outcome.size_bytes - outcome.origin_bytes
    assert noted.told[-1] == (outcome.size_bytes, outcome.size_bytes, "1 of 1 nodes")
