"""The manifest: what is in it, how it is cut into segments, and which line is wrong."""

import hashlib
import json
import os
import tracemalloc
from pathlib import Path

import pytest
import xxhash
from staging_samples import SEGMENT, make_files

from hpcutils.errors import DataError, SpecError
from hpcutils.staging.find import Found, find_files
from hpcutils.staging.manifest import Entry, read_manifest, write_manifest
from hpcutils.staging.segments import cut


def test_a_folder(tmp_path):
    source = make_files(tmp_path / "source")
    made = write_manifest(find_files([source]), tmp_path / "m.jsonl", SEGMENT)
    entries = list(made.entries())
    assert [entry.path for entry in entries] == sorted(
        str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()
    )
    for entry in entries:
        body = (source / entry.path).read_bytes()
        assert (entry.size_bytes, entry.sha256) == (len(body), hashlib.sha256(body).hexdigest())
    whole = b"".join((source / entry.path).read_bytes() for entry in entries)
    assert (made.total.files, made.total.size_bytes) == (len(entries), len(whole))
    segments = list(cut(made.entries(), SEGMENT, made.total.tail))
    assert len(segments) == made.segments == -(-len(whole) // SEGMENT)
    for segment in segments:
        start = segment.number * SEGMENT
        assert segment.digest == xxhash.xxh3_128_hexdigest(whole[start : start + SEGMENT])


def test_a_large_file_is_read_ahead_and_gives_the_same(tmp_path):
    body = os.urandom(9 << 20)
    (tmp_path / "x").write_bytes(body)
    entry = next(iter(write_manifest(find_files([tmp_path / "x"]), tmp_path / "m", 1 << 20).entries()))
    assert entry.sha256 == hashlib.sha256(body).hexdigest()
    assert list(entry.segments) == [xxhash.xxh3_128_hexdigest(body[at : at + (1 << 20)]) for at in range(0, 9 << 20, 1 << 20)]


def test_files_start_from_the_folder_that_holds_them(tmp_path):
    make_files(tmp_path)
    found = find_files([tmp_path / "large.h5", tmp_path / "small" / "deep"])
    assert [file.name for file in found] == ["large.h5", "small/deep/empty"]


@pytest.mark.parametrize("older", [False, True], ids=["the first", "in place of an older one"])
def test_a_manifest_among_its_files_does_not_list_itself(tmp_path, monkeypatch, older):
    source = make_files(tmp_path / "source")
    wanted = [file.name for file in find_files([source])]
    monkeypatch.chdir(source)
    if older:
        (source / "m.jsonl").write_text("older\n")
    made = write_manifest(find_files([Path()]), Path("m.jsonl"), SEGMENT)
    assert [entry.path for entry in made.entries()] == wanted


def test_names_outside_of_unicode_survive(tmp_path):
    name = os.fsdecode(b"caf\xe9 \n.bin")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_bytes(b"x")
    assert next(iter(write_manifest(find_files([tmp_path / "d"]), tmp_path / "m").entries())).path == name


def test_a_file_twice_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(DataError, match="'x' is listed twice"):
        write_manifest([Found("x", tmp_path / "x")] * 2, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["missing", "fifo", "link to a folder", "dangling link"])
def test_what_is_no_file_is_named(tmp_path, kind):
    folder = tmp_path / "d"
    folder.mkdir()
    if kind == "fifo":
        os.mkfifo(folder / "odd")
    elif kind != "missing":
        (folder / "odd").symlink_to(tmp_path if kind == "link to a folder" else "nowhere")
    with pytest.raises(DataError, match="missing" if kind == "missing" else "odd"):
        list(find_files([folder / "missing" if kind == "missing" else folder]))


def lines(files: int = 3) -> list[str]:
    body = [Entry(f"f{number}", SEGMENT // 2, "0" * 64).line() for number in range(files)]
    body[1] = Entry("f1", SEGMENT // 2, "0" * 64, ("a" * 32,)).line()
    head = json.dumps({"format": "hpcutils-manifest-1", "segment_bytes": SEGMENT}) + "\n"
    tail = "b" * 32 if files % 2 else None
    return [head, *body, json.dumps({"files": files, "size": files * SEGMENT // 2, "tail": tail}) + "\n"]


def test_the_sample_is_right(tmp_path):
    (tmp_path / "m").write_text("".join(lines()))
    assert len(list(read_manifest(tmp_path / "m").entries())) == 3


@pytest.mark.parametrize(
    "line, old, new, said",
    [
        (1, "hpcutils-manifest-1", "other", ":1: no hpcutils-manifest-1"),
        (1, str(SEGMENT), "0", ":1: no hpcutils-manifest-1"),
        (2, '{"path"', '{"path', ":2: no JSON"),
        (2, '{"path":"f0"', '["f0"', ":2: no JSON"),
        (2, "f0", "../f0", ":2: path: a relative path"),
        (2, "f0", "/etc/f0", ":2: path: a relative path"),
        (2, "f0", "a//b", ":2: path: a relative path"),
        (2, "f0", "", ":2: path: a relative path"),
        (3, str(SEGMENT // 2), "-1", ":3: size: a number of bytes was expected, got -1"),
        (3, str(SEGMENT // 2), "true", ":3: size: a number of bytes was expected, got True"),
        (3, str(SEGMENT // 2), "1.5", ":3: size: a number of bytes was expected, got 1.5"),
        (3, str(SEGMENT // 2), "1", ":3: 0 segments end in 'f1', and 1 are listed"),
        (3, '"' + "a" * 32 + '"', "", ":3: 1 segments end in 'f1', and 0 are listed"),
        (3, "a" * 32, "a" * 31, ":3: segments: a list of digests"),
        (4, "0" * 64, "x" * 64, ":4: sha256: 64 hexadecimal digits"),
        (4, "sha256", "sha1", ":4: unknown key 'sha1'"),
        (5, '"files": 3', '"files": 2', ":5: the totals say 2 files"),
        (5, '"' + "b" * 32 + '"', "null", ":5: tail: a digest was expected"),
        (5, "}\n", "}\n\n{}\n", "the last line is not the one with the totals"),
        (5, "}", "", "the last line is not the one with the totals"),
    ],
)
def test_errors_name_the_line(tmp_path, line, old, new, said):
    damaged = lines()
    assert old in damaged[line - 1]
    damaged[line - 1] = damaged[line - 1].replace(old, new, 1)
    (tmp_path / "m").write_text("".join(damaged))
    with pytest.raises(SpecError) as caught:
        list(read_manifest(tmp_path / "m").entries())
    assert said in caught.value.message
    assert str(tmp_path / "m") in caught.value.message


@pytest.mark.parametrize(
    "names, line, said",
    [
        (["a", "a"], 3, "'a' is listed twice"),
        (["b", "a", "c", "b"], 5, "'b' is listed twice"),
        (["b", "a", "a"], 4, "'a' is listed twice"),
        (["a", "a/b"], 3, "'a/b' lies below a file"),
        (["a/b", "a.b", "a", "a.b"], 5, "'a.b' is listed twice"),
    ],
)
def test_a_path_that_comes_twice_is_found_where_it_does(tmp_path, names, line, said):
    body = "".join(Entry(name, 0, "0" * 64).line() for name in names)
    head = json.dumps({"format": "hpcutils-manifest-1", "segment_bytes": SEGMENT}) + "\n"
    (tmp_path / "m").write_text(head + body + json.dumps({"files": len(names), "size": 0, "tail": "b" * 32}) + "\n")
    with pytest.raises(SpecError, match=f"m:{line}: path: {said}"):
        list(read_manifest(tmp_path / "m").entries())


@pytest.mark.parametrize("names", [["x", "x"], ["y", "x", "y"], ["y", "x", "x"]])
def test_a_path_that_is_given_twice_is_refused(tmp_path, names):
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(DataError, match="is listed twice"):
        write_manifest([Found(name, tmp_path / "x") for name in names], tmp_path / "m")


@pytest.mark.parametrize("lost", [1, 2, 3, 4])
def test_a_line_that_is_lost_is_missed(tmp_path, lost):
    (tmp_path / "m").write_text("".join(line for number, line in enumerate(lines()) if number != lost))
    with pytest.raises(SpecError):
        list(read_manifest(tmp_path / "m").entries())


def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    def peak(files: int) -> int:
        made = [Entry(f"folder/{number:09}", 0).line() for number in range(files)]
        head = json.dumps({"format": "hpcutils-manifest-1", "segment_bytes": SEGMENT}) + "\n"
        (tmp_path / "m").write_text(head + "".join(made) + json.dumps({"files": files, "size": 0, "tail": "0" * 32}) + "\n")
        del made
        tracemalloc.start()
        assert sum(1 for _ in read_manifest(tmp_path / "m").entries()) == files
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(20_000) < 2 * peak(2_000)
