"""`data.stage: overlap`: what a rank knows of its files while they arrive, and how the job ends with them."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest
from servers import chunked, honest, ignores_range, serving
from staging_samples import SEGMENT, left_in

from hpcutils.errors import DataError, IntegrityError, JobFailedError, SpecError
from hpcutils.specs.job import Job, load_job
from hpcutils.staging import cache, stage
from hpcutils.staging.find import find_files
from hpcutils.staging.manifest import write_manifest
from hpcutils.staging.origins import FolderOrigin, origin_of
from hpcutils.train.arrivals import Arrivals
from hpcutils.train.ranks import Ranks
from hpcutils.train.stager import stage_files
from hpcutils.world import World

BODY = os.urandom(20 * SEGMENT)


class Gate:
    """Lets the moving read so many bytes of a source, and the rest when it is opened; reads through do not pass it."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes, self.opened = free_bytes, threading.Event()
        self.error: Exception | None = None

    def origin(self, base: str, **more: bool) -> FolderOrigin:
        gate, origin = self, origin_of(base, **more)
        assert isinstance(origin, FolderOrigin)
        read = origin.read

        def guarded(piece, buffer):
            if piece.offset + len(buffer) > gate.free_bytes:
                assert gate.opened.wait(60)
                if gate.error is not None:
                    raise gate.error
            read(piece, buffer)

        origin.read = guarded
        return origin


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(9 * SEGMENT)
    monkeypatch.setattr(stage, "origin_of", gate.origin)
    yield gate
    gate.opened.set()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCUTILS_NODE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "job" / "sets").mkdir(parents=True)
    (tmp_path / "job" / "sets" / "x.h5").write_bytes(BODY)
    (tmp_path / "job" / "sets" / "y.h5").write_bytes(BODY[:100])
    (tmp_path / "job" / "model.py").write_text("def build(): ...\n")
    write_manifest(find_files([tmp_path / "job" / "sets"]), tmp_path / "job" / "m.jsonl", SEGMENT)
    return tmp_path / "job"


def job_of(folder: Path, files: str, staging: str = "{}") -> Job:
    (folder / "train.yaml").write_text(
        f"name: x\ndata: {{files: {files}, x: a, y: b, stage: overlap}}\nmodel: {{function: model.py:build}}\n"
        f"training: {{epochs: 1, batch_size: 1, loss: mse}}\nstaging: {staging}\n"
    )
    return load_job(folder / "train.yaml")


LISTED = ("[{path: sets/x.h5}]", "{manifest: m.jsonl, source: sets}")


def begin(folder: Path, files: str, staging: str = "{}") -> Arrivals:
    return stage_files(job_of(folder, files, staging), folder, Ranks(World()))


def read(arrivals: Arrivals, offset: int, size: int) -> bytes:
    buffer = bytearray(size)
    arrivals.sources["x.h5"].read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_steps_go_on_while_the_rest_arrives(folder, gate):
    arrivals = begin(folder, *LISTED)
    path = arrivals.staged["x.h5"].path
    assert not path.exists()
    assert read(arrivals, 15 * SEGMENT, SEGMENT) == BODY[15 * SEGMENT : 16 * SEGMENT]
    arrivals.look(7)
    gate.opened.set()
    arrivals.finish()
    assert path.read_bytes() == BODY
    (record,) = arrivals.records
    assert (record["origin_bytes"], record["read_through_bytes"], record["steps_meanwhile"]) == (20 * SEGMENT + 100, SEGMENT, 7)
    assert left_in(folder.parent / "cache") == []
    # The next job finds it.
    again = begin(folder, *LISTED)
    assert (again.sources, again.is_open, again.staged["x.h5"]) == ({}, False, arrivals.staged["x.h5"])
    again.finish()
    assert again.records[0]["origin_bytes"] == 0


def test_a_file_with_a_digest_and_one_of_a_manifest_arrive_one_behind_the_other(folder, gate):
    (folder / "z.h5").write_bytes(BODY[:5000])
    sha256 = hashlib.sha256(BODY[:5000]).hexdigest()
    arrivals = begin(folder, f"[{{path: sets/x.h5}}, {{path: z.h5, sha256: {sha256}}}]", LISTED[1])
    assert set(arrivals.sources) == {"x.h5", "z.h5"}
    assert arrivals.staged["z.h5"].sha256 == sha256
    gate.opened.set()
    arrivals.finish()
    assert [record["size_bytes"] for record in arrivals.records] == [20 * SEGMENT + 100, 5000]
    assert arrivals.staged["z.h5"].path.read_bytes() == BODY[:5000]


def test_what_waits_to_be_moved_has_its_room(folder, gate):
    (folder / "z.h5").write_bytes(BODY[:-1])
    sha256 = hashlib.sha256(BODY[:-1]).hexdigest()
    files = f"[{{path: sets/x.h5}}, {{path: z.h5, sha256: {sha256}}}]"
    quota = (len(BODY) + 1000) / 1e9
    with pytest.raises(DataError, match=r"no room for z\.h5"):
        begin(folder, files, f"{{manifest: m.jsonl, source: sets, quota_gb: {quota}}}")
    assert cache.kept_in(folder.parent / "cache") == []
    assert left_in(folder.parent / "cache") == []


def test_what_ends_the_moving_ends_the_steps(folder, gate):
    arrivals = begin(folder, *LISTED)
    gate.error = DataError("the source is gone")
    gate.opened.set()
    with pytest.raises(DataError, match="the source is gone"):
        for _ in range(6000):
            arrivals.look(1)
            threading.Event().wait(0.01)
    with pytest.raises(DataError, match="the source is gone"):
        arrivals.finish()
    assert cache.kept_in(folder.parent / "cache") == []


def test_a_fault_of_our_own_ends_them_too(folder, gate, capfd):
    arrivals = begin(folder, *LISTED)
    gate.error = ZeroDivisionError("no")
    gate.opened.set()
    with pytest.raises(JobFailedError, match="ZeroDivisionError: no"):
        arrivals.finish()
    assert "Traceback" in capfd.readouterr().err


def test_a_wrong_sha256_is_an_error_when_training_is_over(folder, gate):
    arrivals = begin(folder, f"[{{path: sets/x.h5, sha256: {'ab' * 32}}}]")
    assert read(arrivals, 0, 5000) == BODY[:5000]
    gate.opened.set()
    with pytest.raises(IntegrityError, match="sha256 of the"):
        arrivals.finish()
    assert cache.kept_in(folder.parent / "cache") == []
    assert left_in(folder.parent / "cache") == []


def test_a_source_that_said_something_else_meanwhile_is_an_error(folder, gate):
    arrivals = begin(folder, *LISTED)
    with (folder / "sets" / "x.h5").open("r+b") as stream:
        stream.seek(15 * SEGMENT)
        stream.write(b"other")
    read(arrivals, 15 * SEGMENT, SEGMENT)
    # In place: the moving has not opened the file yet, perhaps, and would find it without its length.
    with (folder / "sets" / "x.h5").open("r+b") as stream:
        stream.write(BODY)
    gate.opened.set()
    with pytest.raises(IntegrityError, match="were others when training read them"):
        arrivals.finish()


def test_a_file_that_the_manifest_does_not_list_needs_a_digest(folder):
    (folder / "z.h5").write_bytes(b"z")
    with pytest.raises(SpecError, match=r"z\.h5 has no sha256, and m\.jsonl does not list it"):
        begin(folder, "[{path: sets/x.h5}, {path: z.h5}]", LISTED[1])


@pytest.mark.parametrize("server", ["honest", "no ranges", "no length"])
def test_a_server_that_knows_no_ranges_is_staged_before(folder, server):
    sha256 = hashlib.sha256(BODY).hexdigest()
    with serving() as site:
        site.repeat_last = True
        url = site.put("/x.h5", BODY, {"honest": honest, "no ranges": ignores_range(), "no length": chunked()}[server])
        arrivals = begin(folder, f"[{{url: '{url}', sha256: {sha256}}}]")
        assert bool(arrivals.sources) is arrivals.is_open is (server == "honest")
        arrivals.finish()
    assert arrivals.staged["x.h5"].path.read_bytes() == BODY
    assert arrivals.records[0]["origin_bytes"] == len(BODY)
