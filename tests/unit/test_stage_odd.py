"""Input that is odd: told as an error of the tree, with its line where it has one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from servers import serving
from staging_samples import SEGMENT, make_set, stage_set, tree_of

from hpcutils.cli.stage import stage as commands
from hpcutils.errors import DataError, SpecError
from hpcutils.staging.find import find_files
from hpcutils.staging.items import Item
from hpcutils.staging.manifest import Entry, read_manifest, write_manifest
from hpcutils.staging.stage import stage

HEAD = json.dumps({"format": "hpcutils-manifest-1", "segment_bytes": SEGMENT}) + "\n"
TOTAL = json.dumps({"files": 1, "size": 0, "tail": "b" * 32}) + "\n"
LINE = Entry("f", 0, "0" * 64).line()
NESTED = "[" * 200_000


def lone_surrogate() -> str:
    return LINE.replace('"f"', '"\\ud800"')


@pytest.mark.parametrize(
    "lines, said",
    [
        ([HEAD, lone_surrogate(), TOTAL], ":2: path: a relative path"),
        ([HEAD, LINE.replace('"f"', f'"{"d/" * 1100}f"'), TOTAL], ":2: path: no more than 100 folders"),
        ([HEAD, NESTED + "\n", TOTAL], ":2: no JSON"),
        ([NESTED + "\n", LINE, TOTAL], ":1: no JSON"),
        ([HEAD, LINE, NESTED + "\n"], ":3: the last line is not the one with the totals"),
        ([HEAD, LINE, "{}\n"], ":3: the last line is not the one with the totals"),
        ([HEAD, LINE, LINE.rstrip("\n")], ":3: the last line is not the one with the totals"),
        ([HEAD.replace(str(SEGMENT), str((1 << 30) + 1)), LINE, TOTAL], ":1: segment_bytes: at most 1 GiB"),
        ([HEAD, LINE.replace(":0", ":" + "9" * 5000), TOTAL], ":2: no JSON"),
    ],
    ids=["surrogate", "deep path", "nested", "nested head", "nested total", "empty total", "cut off", "segments", "number"],
)
def test_a_manifest_with_an_odd_line(tmp_path, lines, said):
    (tmp_path / "m").write_text("".join(lines))
    with pytest.raises(SpecError) as caught:
        list(read_manifest(tmp_path / "m").entries())
    assert caught.value.message.startswith(f"{tmp_path}/m{said}")


def test_a_segment_may_have_a_gibibyte(tmp_path):
    (tmp_path / "m").write_text(HEAD.replace(str(SEGMENT), str(1 << 30)) + LINE + TOTAL)
    assert len(list(read_manifest(tmp_path / "m").entries())) == 1


def test_the_plan_reads_every_line(tmp_path):
    (tmp_path / "m").write_text(HEAD + "garbage\n" + TOTAL)
    done = CliRunner().invoke(commands, ["plan", str(tmp_path / "m"), "--cache", str(tmp_path / "cache")])
    assert isinstance(done.exception, SpecError)
    assert f"{tmp_path}/m:2: no JSON" in done.exception.message


def deep(folder: Path, levels: int) -> Path:
    """Make a file so many folders below; a path that long must be made step by step."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    return folder


def test_a_folder_that_is_too_deep(tmp_path):
    (tmp_path / "deep").mkdir()
    deep(tmp_path / "deep", 1100)
    with pytest.raises(DataError, match="more than 100 folders"):
        write_manifest(find_files([tmp_path / "deep"]), tmp_path / "m")
    # pytest's own removal goes down by recursion, and would fail at so many.
    for _ in range(1100):
        (tmp_path / "deep" / "d").rename(tmp_path / "inner")
        (tmp_path / "deep").rmdir()
        (tmp_path / "inner").rename(tmp_path / "deep")


def test_a_folder_of_a_hundred_levels_is_staged(tmp_path):
    (tmp_path / "deep").mkdir()
    manifest = write_manifest(find_files([deep(tmp_path / "deep", 100)]), tmp_path / "m").path
    assert len(tree_of(stage_set(manifest, tmp_path / "deep", tmp_path / "cache").files)) == 1


def test_a_name_outside_of_unicode(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    source = tmp_path / "source"
    source.mkdir()
    (source / name).write_bytes(b"x")
    manifest = write_manifest(find_files([source]), tmp_path / "m.jsonl").path
    assert tree_of(stage_set(manifest, source, tmp_path / "cache").files) == {name: b"x"}
    assert stage(Item(name, str(source / name), None), tmp_path / "other").path.read_bytes() == b"x"
    with serving() as site:
        site.put("/set/caf%E9", b"x")
        assert tree_of(stage_set(manifest, f"{site.url}/set", tmp_path / "web").files) == {name: b"x"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("where", ["source", "cache", "marker", "manifest", "one file"])
def test_a_pipe_is_no_file(tmp_path, where):
    source, manifest = make_set(tmp_path)
    root = tmp_path / "cache"
    files = stage_set(manifest, source, root).files
    place = {"source": source / "large.h5", "cache": files / "large.h5", "marker": files.parent / "complete.jsonl"}
    path = place.get(where, manifest if where == "manifest" else tmp_path / "x")
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    if where in ("cache", "marker"):
        assert tree_of(stage_set(manifest, source, root).files) == tree_of(source)
    elif where == "one file":
        with pytest.raises(DataError, match="not a plain file"):
            stage(Item("x", str(path), "0" * 64), tmp_path / "other")
    else:
        with pytest.raises((DataError, SpecError), match="not a plain file"):
            stage_set(manifest, source, tmp_path / "other")


def test_a_link_to_a_file_is_listed_under_its_own_name(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "v7.h5").write_bytes(b"x")
    (tmp_path / "train.h5").symlink_to("data/v7.h5")
    (tmp_path / "way").symlink_to("data")
    (tmp_path / "labels.h5").write_bytes(b"y")
    names = [file.name for file in find_files([tmp_path / "train.h5", tmp_path / "labels.h5"])]
    assert names == ["train.h5", "labels.h5"]
    assert [file.name for file in find_files([tmp_path / "train.h5"])] == ["train.h5"]
    assert [file.name for file in find_files([tmp_path / "way" / "v7.h5", tmp_path / "labels.h5"])] == ["data/v7.h5", "labels.h5"]
