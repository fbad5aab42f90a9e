"""A source that is written while it is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from servers import serving
from staging_disk import published
from staging_samples import left_in

from hpcutils.errors import DataError
from hpcutils.staging import origins, stage
from hpcutils.staging.items import Item

SIZE = 9 << 20


def rewrite(path: Path) -> None:
    """In place, as a program does that updates a file; the length stays."""
    with path.open("r+b") as stream:
        stream.write(b"\1" * SIZE)


def replace(path: Path) -> None:
    """Another file under the name, of the same length and time."""
    facts = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"\1" * SIZE)
    os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    other.replace(path)


def during_the_read(monkeypatch, kind: type, at: int, happens) -> None:
    honest, count = kind.read, [0]

    def read(self, piece, buffer) -> None:
        count[0] += 1
        if count[0] == at:
            happens()
        honest(self, piece, buffer)

    monkeypatch.setattr(kind, "read", read)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("change", [rewrite, replace])
def test_a_file_that_is_rewritten_while_it_is_read(tmp_path, monkeypatch, change, at):
    path = tmp_path / "x"
    path.write_bytes(bytes(SIZE))
    os.utime(path, (1000, 1000))
    with monkeypatch.context() as patch:
        during_the_read(patch, origins.FolderOrigin, at, lambda: change(path))
        with pytest.raises(DataError, match="changed while it was read"):
            stage.stage(Item("x", str(path), None), tmp_path / "cache")
    assert published(tmp_path / "cache") == []
    assert left_in(tmp_path / "cache") == []
    assert stage.stage(Item("x", str(path), None), tmp_path / "cache").path.read_bytes() == path.read_bytes()


def test_a_file_that_changes_on_the_web_while_it_is_read(tmp_path, monkeypatch):
    with serving() as site:
        site.repeat_last = True
        url = site.put("/x", bytes(SIZE))
        with monkeypatch.context() as patch:
            during_the_read(patch, origins.WebOrigin, 2, lambda: site.put("/x", b"\1" * SIZE))
            with pytest.raises(DataError, match=r"changed while it was read|it is another file"):
                stage.stage(Item("x", url, None), tmp_path / "cache")
        assert published(tmp_path / "cache") == []
        assert stage.stage(Item("x", url, None), tmp_path / "cache").path.read_bytes() == b"\1" * SIZE
