"""Staging between real MPI ranks, each of which is the leader of a node with a cache of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# The samples are shared with the unit tests, which are not a package.
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from servers import chunked, honest, ignores_range, serving
from staging_samples import SEGMENT, left_in, make_set, tree_of

from hpcutils.launch.local import LOCAL_ENVIRONMENT, find_mpirun
from hpcutils.staging.find import find_files
from hpcutils.staging.manifest import read_manifest, write_manifest

pytestmark = pytest.mark.mpi
RANK = Path(__file__).with_name("staging_ranks.py")


def run(count: int, folder: Path, **spec: object) -> subprocess.CompletedProcess[str]:
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    argv = [find_mpirun(), *root, "-n", str(count), sys.executable, str(RANK), str(folder), json.dumps(spec)]
    return subprocess.run(argv, env=os.environ | LOCAL_ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)


def ranks(count: int, folder: Path, **spec: object) -> list[dict]:
    """Stage on `count` nodes; return what each said."""
    done = run(count, folder, **spec)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["rank"] for each in said] == list(range(count)), done.stderr
    return said


def check(said: list[dict], source: Path, folder: Path) -> None:
    """See that every node has what the source has, and nothing was left."""
    for each in said:
        assert "error" not in each, each
        assert tree_of(Path(each["files"])) == tree_of(source)
        assert left_in(folder / f"node{each['rank']}") == []


@pytest.mark.parametrize("nodes", [2, 4, 16])
def test_the_source_is_read_once(tmp_path, nodes):
    source = tmp_path / "source"
    (source / "small").mkdir(parents=True)
    (source / "large").write_bytes(os.urandom(24 << 20))
    for number in range(100):
        (source / "small" / str(number)).write_bytes(os.urandom(4000))
    manifest = write_manifest(find_files([source]), tmp_path / "m.jsonl", 1 << 20)
    size = manifest.total.size_bytes
    said = ranks(nodes, tmp_path, manifest=str(manifest.path), source=str(source))
    check(said, source, tmp_path)
    assert {each["origin_bytes"] for each in said} == {size}
    assert {each["received_bytes"] for each in said} == {size * (nodes - 1)}
    # The kernel's own count: the data once, and each node's manifest and bookkeeping.
    assert size <= sum(each["rchar"] for each in said) < size + nodes * 150_000
    warm = ranks(nodes, tmp_path, manifest=str(manifest.path), source=str(tmp_path / "gone"))
    check(warm, source, tmp_path)
    assert {each["origin_bytes"] for each in warm} == {0}


def test_a_file_without_a_manifest(tmp_path):
    body = os.urandom((9 << 20) + 17)
    (tmp_path / "x.h5").write_bytes(body)
    for sha256 in (hashlib.sha256(body).hexdigest(), None):
        said = ranks(3, tmp_path / str(sha256), item={"name": "x.h5", "origin": str(tmp_path / "x.h5"), "sha256": sha256})
        for each in said:
            assert (Path(each["files"]) / "x.h5").read_bytes() == body
            assert (each["digest"], each["origin_bytes"]) == (hashlib.sha256(body).hexdigest(), len(body))


@pytest.mark.parametrize("server", ["honest", "no ranges", "no length"])
def test_a_file_of_a_web_server(tmp_path, server):
    body = os.urandom((14 << 20) + 17)
    quirk = {"honest": honest, "no ranges": ignores_range(), "no length": chunked()}[server]
    with serving() as site:
        site.repeat_last = True
        item = {"name": "x.h5", "origin": site.put("/x.h5", body, quirk), "sha256": hashlib.sha256(body).hexdigest()}
        said = ranks(3, tmp_path, item=item)
    for each in said:
        assert (Path(each["files"]) / "x.h5").read_bytes() == body
        assert each["origin_bytes"] == len(body)
    if server == "honest":
        # One request to learn the length, one to see whether ranges are known, and then each leader's part.
        assert {asked for asked in site.ranges() if asked} >= {"bytes=1-1", f"bytes={4 << 20}-{(8 << 20) - 1}"}


def test_nodes_that_have_it_give_it_to_those_that_lack_it(tmp_path):
    source, manifest = make_set(tmp_path)
    spec = {"manifest": str(manifest), "source": str(source)}
    check(ranks(4, tmp_path, **spec), source, tmp_path)
    for node in ("node1", "node3"):
        shutil.rmtree(tmp_path / node)
    said = ranks(4, tmp_path, **spec | {"source": str(tmp_path / "gone")})
    check(said, source, tmp_path)
    assert said[0]["origin_bytes"] == 0


def test_the_log_tells_of_the_last_node(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x").write_bytes(os.urandom(3 << 20))
    manifest = write_manifest(find_files([tmp_path / "source"]), tmp_path / "m.jsonl", 1 << 20)
    spec = {"manifest": str(manifest.path), "source": str(tmp_path / "source")}
    ranks(2, tmp_path, **spec)
    shutil.rmtree(tmp_path / "node1")
    # Rank 0, which writes the log, has all of it.
    said = run(2, tmp_path, **spec).stderr
    assert "m.jsonl: 3.0 of 3.0 MiB (100%)" in said
    assert "2 of 2 nodes" in said
    assert " 0.0 MiB/s" not in said


def test_a_node_whose_copy_rotted_gives_none_of_it(tmp_path):
    source, manifest = make_set(tmp_path)
    spec = {"manifest": str(manifest), "source": str(source)}
    first = ranks(2, tmp_path, **spec)
    large = Path(first[0]["files"]) / "large.h5"
    facts = large.stat()
    with large.open("r+b") as stream:
        stream.seek(SEGMENT + 100)
        stream.write(b"\0\0\0\0")
    os.utime(large, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    shutil.rmtree(tmp_path / "node1")
    said = ranks(2, tmp_path, **spec)
    check(said, source, tmp_path)
    # Read once more from the source; the rotten node gets it from the other one.
    assert said[0]["origin_bytes"] == SEGMENT


def test_nodes_with_different_beginnings(tmp_path):
    source, manifest = make_set(tmp_path)
    spec = {"manifest": str(manifest), "source": str(source)}
    # Node 1 stages alone until its source lacks a file, node 0 starts anew.
    short = tmp_path / "short"
    shutil.copytree(source, short)
    (short / "small" / "11.bin").unlink()
    failed = ranks(2, tmp_path, manifest=str(manifest), source=str(short))
    assert {each["error"] for each in failed} == {"DataError"}
    assert all("11.bin" in each["message"] for each in failed)
    shutil.rmtree(tmp_path / "node0")
    said = ranks(2, tmp_path, **spec)
    check(said, source, tmp_path)
    assert said[0]["origin_bytes"] < read_manifest(manifest).total.size_bytes


@pytest.mark.parametrize("nodes", [2, 4])
def test_a_segment_that_is_damaged_on_the_way_is_asked_for_again(tmp_path, nodes):
    source, manifest = make_set(tmp_path)
    said = ranks(nodes, tmp_path, manifest=str(manifest), source=str(source), flips_on=1, flips=2, segment=3)
    check(said, source, tmp_path)
    assert {each["repeats"] for each in said} == {2}


@pytest.mark.parametrize("nodes", [2, 4])
def test_a_segment_that_never_comes_right_is_an_error_of_all(tmp_path, nodes):
    source, manifest = make_set(tmp_path)
    spec = {"manifest": str(manifest), "source": str(source)}
    said = ranks(nodes, tmp_path, **spec, flips_on=1, flips=99, segment=1)
    assert {each["error"] for each in said} == {"IntegrityError"}
    receiver = 2 % nodes
    assert {each["message"] for each in said} == {f"segment 1 (large.h5) came damaged to node{receiver} 3 times from leader 1"}
    check(ranks(nodes, tmp_path, **spec), source, tmp_path)


def test_a_full_disk_on_one_node_is_an_error_of_all(tmp_path):
    source, manifest = make_set(tmp_path)
    spec = {"manifest": str(manifest), "source": str(source)}
    said = ranks(4, tmp_path, **spec, full_on=2, full_after=3 * SEGMENT)
    assert {each["error"] for each in said} == {"DataError"}
    assert all("node2" in each["message"] and "No space left" in each["message"] for each in said)
    check(ranks(4, tmp_path, **spec), source, tmp_path)


def test_a_source_that_one_node_does_not_see_is_an_error_of_all(tmp_path):
    source, manifest = make_set(tmp_path)
    sources = [str(source), str(tmp_path / "gone"), str(source)]
    said = ranks(3, tmp_path, manifest=str(manifest), sources=sources)
    assert {each["error"] for each in said} == {"DataError"}
    assert all(str(tmp_path / "gone") in each["message"] for each in said)
    check(ranks(3, tmp_path, manifest=str(manifest), source=str(source)), source, tmp_path)


@pytest.mark.parametrize("after", [0, 2 * SEGMENT, 6 * SEGMENT])
def test_a_node_that_is_lost_ends_the_job_and_the_next_one_goes_on(tmp_path, after):
    source, manifest = make_set(tmp_path)
    spec = {"manifest": str(manifest), "source": str(source)}
    assert run(3, tmp_path, **spec, dies_on=1, dies_after=after).returncode != 0
    for marker in tmp_path.glob("node*/*/*/complete.jsonl"):
        assert marker.parent.name.startswith(".") or tree_of(marker.parent / "files") == tree_of(source)
    check(ranks(3, tmp_path, **spec), source, tmp_path)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("rank", [0, 2], ids=["the first node", "the last node"])
def test_a_node_that_is_lost_at_the_publishing(tmp_path, rank, when):
    source, manifest = make_set(tmp_path)
    spec = {"manifest": str(manifest), "source": str(source)}
    assert run(3, tmp_path, **spec, dies_at_publish=rank, when=when).returncode != 0
    for marker in tmp_path.glob("node*/*/*/complete.jsonl"):
        assert marker.parent.name.startswith(".") or tree_of(marker.parent / "files") == tree_of(source)
    check(ranks(3, tmp_path, **spec), source, tmp_path)


@pytest.mark.parametrize("step", ["the folder", "the sidecar", "opening", "the list", "the marker", "the name"])
@pytest.mark.parametrize("rank", [0, 1], ids=["the first node", "the last node"])
def test_a_full_disk_at_any_step_is_an_error_of_all(tmp_path, rank, step):
    source, manifest = make_set(tmp_path)
    spec = {"manifest": str(manifest), "source": str(source)}
    said = ranks(2, tmp_path, **spec, full_at_step_on=rank, step=step)
    assert {each["error"] for each in said} == {"DataError"}
    assert all("No space left" in each["message"] for each in said)
    for marker in tmp_path.glob("node*/*/*/complete.jsonl"):
        assert marker.parent.name.startswith(".") or tree_of(marker.parent / "files") == tree_of(source)
    check(ranks(2, tmp_path, **spec), source, tmp_path)
