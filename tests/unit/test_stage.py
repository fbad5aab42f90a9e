"""Staging on one node: what arrives, what is found there again, what is taken up, what is refused."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
from servers import Site, answers, breaks_after, chunked, ignores_range, serving
from staging_disk import begin_partial, published
from staging_samples import SEGMENT, left_in, make_set, stage_set, tree_of

from hpcutils.errors import DataError, IntegrityError, SpecError
from hpcutils.staging import stage as room
from hpcutils.staging import store
from hpcutils.staging.dataset import dataset_of_manifest
from hpcutils.staging.items import Item, Settings
from hpcutils.staging.leaders import Leaders
from hpcutils.staging.look import look, place_of
from hpcutils.staging.manifest import read_manifest
from hpcutils.staging.owner import owner_in
from hpcutils.staging.stage import stage, stage_item


@pytest.fixture
def site():
    with serving() as running:
        yield running


def look_at(manifest: Path, root: Path, **words):
    dataset = dataset_of_manifest(read_manifest(manifest))
    return look(dataset, place_of(dataset, root), **words)


def test_a_dataset_arrives_and_is_found_again(tmp_path):
    source, manifest = make_set(tmp_path)
    assert look_at(manifest, tmp_path / "cache").facts.state == "missing"
    first = stage_set(manifest, source, tmp_path / "cache")
    assert tree_of(first.files) == tree_of(source)
    assert first.origin_bytes == first.size_bytes == sum(map(len, tree_of(source).values()))
    assert look_at(manifest, tmp_path / "cache").facts.state == "present"
    assert left_in(tmp_path / "cache") == []
    for path in source.rglob("*.bin"):
        path.unlink()
    again = stage_set(manifest, source, tmp_path / "cache")
    assert (again.files, again.digest, again.origin_bytes) == (first.files, first.digest, 0)


def test_looking_touches_nothing(tmp_path):
    _, manifest = make_set(tmp_path)
    look_at(manifest, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("size", [0, 1, SEGMENT, 5 << 20])
@pytest.mark.parametrize("known", [True, False])
def test_one_file(tmp_path, size, known):
    body = os.urandom(size)
    (tmp_path / "x.h5").write_bytes(body)
    sha256 = hashlib.sha256(body).hexdigest()
    item = Item("x.h5", str(tmp_path / "x.h5"), sha256 if known else None)
    first = stage(item, tmp_path / "cache")
    assert (first.path.read_bytes(), first.path.name, first.sha256, first.moved_bytes) == (body, "x.h5", sha256, size)
    assert stage(item, tmp_path / "cache") == room.Staged(first.path, sha256, 0)
    assert left_in(tmp_path / "cache") == []
    assert store.is_intact(first.path.parents[1])


def test_a_file_without_a_digest_is_known_by_its_time(tmp_path):
    source = tmp_path / "x"
    source.write_bytes(b"old")
    item = Item("x", str(source), None)
    assert stage(item, tmp_path / "cache").path.read_bytes() == b"old"
    source.write_bytes(b"new")
    os.utime(source, ns=(1, 1))
    assert stage(item, tmp_path / "cache").path.read_bytes() == b"new"


def test_the_same_bytes_under_two_names(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"same")
    digest = hashlib.sha256(b"same").hexdigest()
    paths = {stage(Item(name, str(tmp_path / name), digest), tmp_path / "cache").path.name for name in ("a", "b")}
    assert paths == {"a", "b"}


def test_a_known_file_is_not_asked_for_again(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    item = Item("x", str(tmp_path / "x"), hashlib.sha256(b"x").hexdigest())
    stage(item, tmp_path / "cache")
    (tmp_path / "x").unlink()
    assert stage(item, tmp_path / "cache").path.read_bytes() == b"x"


def test_pins_do_not_pile_up(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    item = Item("x", str(tmp_path / "x"), hashlib.sha256(b"x").hexdigest())
    stage(item, tmp_path / "cache")
    (pin,) = (tmp_path / "cache" / "pins").iterdir()
    owner = owner_in(pin.name.split(".", 2)[2])
    for number in range(5):
        # Of jobs that ended: no process that runs started then.
        pin.with_name(pin.name.replace(str(owner), str(replace(owner, start_ticks=number)))).touch()
    assert stage(item, tmp_path / "cache").moved_bytes == 0
    assert list((tmp_path / "cache" / "pins").iterdir()) == [pin]


class Broken(Leaders):
    """Leaders that are told to be two, and note what is done together."""

    def __init__(self):
        super().__init__()
        self.errors = []

    def raise_any(self, error):
        self.errors.append(error)
        super().raise_any(error)


def test_a_dataset_that_goes_while_the_job_starts_is_an_error_of_all(tmp_path, monkeypatch):
    source, manifest = make_set(tmp_path)
    stage_set(manifest, source, tmp_path / "cache")
    leaders = Broken()
    monkeypatch.setattr(store, "read_head", lambda entry: None)
    with pytest.raises(DataError, match="was removed while the job started"):
        room.stage_manifest(manifest, str(source), Settings(tmp_path / "cache"), leaders)
    # Each leader heard of it: nobody waits for the one that raised.
    assert [type(error) for error in leaders.errors if error is not None] == [DataError]


def test_the_wrong_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(IntegrityError, match="sha256 of the 1 bytes"):
        stage(Item("x", str(tmp_path / "x"), "0" * 64), tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.name == "x"] == []


def test_a_flipped_bit_in_the_source(tmp_path):
    source, manifest = make_set(tmp_path)
    with (source / "large.h5").open("r+b") as stream:
        stream.seek(SEGMENT + 5)
        stream.write(b"\0\0\0\0")
    with pytest.raises(IntegrityError, match=rf"segment 1 read on this node from {source}/large.h5 hashes to"):
        stage_set(manifest, source, tmp_path / "cache")
    assert look_at(manifest, tmp_path / "cache").facts.state in ("missing", "partial")


@pytest.mark.parametrize("change", ["longer", "shorter", "gone"])
def test_a_source_that_is_not_what_was_listed(tmp_path, change):
    source, manifest = make_set(tmp_path)
    victim = source / "small" / "07.bin"
    body = victim.read_bytes()
    victim.unlink()
    if change != "gone":
        victim.write_bytes(body + b"x" if change == "longer" else body[:-1])
    with pytest.raises(DataError, match=r"07\.bin") as caught:
        stage_set(manifest, source, tmp_path / "cache")
    assert not isinstance(caught.value, IntegrityError)
    victim.write_bytes(body)
    assert tree_of(stage_set(manifest, source, tmp_path / "cache").files) == tree_of(source)
    assert left_in(tmp_path / "cache") == []


def test_what_a_failed_job_had_is_taken_up(tmp_path):
    source, manifest = make_set(tmp_path)
    last = source / "small" / "11.bin"
    body = last.read_bytes()
    last.unlink()
    with pytest.raises(DataError):
        stage_set(manifest, source, tmp_path / "cache")
    last.write_bytes(body)
    found = look_at(manifest, tmp_path / "cache")
    assert found.facts.state == "partial"
    assert found.facts.have_bytes > 0
    outcome = stage_set(manifest, source, tmp_path / "cache")
    assert outcome.origin_bytes == outcome.size_bytes - found.facts.have_bytes
    assert tree_of(outcome.files) == tree_of(source)
    assert left_in(tmp_path / "cache") == []


def test_a_partial_that_does_not_prove_right_is_moved_again(tmp_path):
    source, manifest = make_set(tmp_path)
    (source / "small" / "11.bin").rename(tmp_path / "aside")
    with pytest.raises(DataError):
        stage_set(manifest, source, tmp_path / "cache")
    (tmp_path / "aside").rename(source / "small" / "11.bin")
    (large,) = (tmp_path / "cache").rglob("large.h5")
    with large.open("r+b") as stream:
        stream.write(b"\0\0\0\0")
    assert 0 not in look_at(manifest, tmp_path / "cache").facts.have
    assert tree_of(stage_set(manifest, source, tmp_path / "cache").files) == tree_of(source)


DAMAGES = {
    "a file is longer": lambda files: (files / "large.h5").open("ab").write(b"x"),
    "a file is shorter": lambda files: os.truncate(files / "large.h5", 1000),
    "a file is gone": lambda files: (files / "small" / "05.bin").unlink(),
    "a file was written": lambda files: (files / "small" / "05.bin").write_bytes(b"\0" * (1 + 5 * 1997)),
    "a file too many": lambda files: (files / "small" / "more").write_bytes(b"x"),
    "a folder too many": lambda files: (files / "more").mkdir(),
    "a link in place of a file": lambda files: (
        (files / "small" / "05.bin").unlink() or (files / "small" / "05.bin").symlink_to("06.bin")
    ),
    "the marker is cut off": lambda files: os.truncate(files.parent / store.MARKER, 300),
    "the marker is gone": lambda files: (files.parent / store.MARKER).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_cache_that_was_changed_is_mended(tmp_path, damage):
    source, manifest = make_set(tmp_path)
    files = stage_set(manifest, source, tmp_path / "cache").files
    DAMAGES[damage](files)
    assert look_at(manifest, tmp_path / "cache").facts.state == "corrupt"
    again = stage_set(manifest, source, tmp_path / "cache")
    assert tree_of(again.files) == tree_of(source)
    assert again.origin_bytes < again.size_bytes
    assert look_at(manifest, tmp_path / "cache").facts.state == "present"
    assert left_in(tmp_path / "cache") == []


def flip(path: Path) -> None:
    """Change a bit as a disk does: size and time stay."""
    facts = path.stat()
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_a_flipped_bit_in_the_cache_is_found_by_verify(tmp_path):
    source, manifest = make_set(tmp_path)
    files = stage_set(manifest, source, tmp_path / "cache").files
    flip(files / "large.h5")
    assert look_at(manifest, tmp_path / "cache").facts.state == "present"
    assert look_at(manifest, tmp_path / "cache", verify=True).facts.state == "corrupt"
    again = stage_set(manifest, source, tmp_path / "cache", verify=True)
    assert again.origin_bytes == SEGMENT
    assert tree_of(again.files) == tree_of(source)


def test_a_flipped_bit_of_one_file_is_found_by_verify(tmp_path):
    (tmp_path / "x").write_bytes(body := os.urandom(100_000))
    item = Item("x", str(tmp_path / "x"), hashlib.sha256(body).hexdigest())
    path = stage(item, tmp_path / "cache").path
    flip(path)
    outcome = stage_item(item, Settings(tmp_path / "cache", verify=True), Leaders())
    assert (outcome.files / "x").read_bytes() == body


STRAYS = {
    "a file": lambda files: (files / "small" / "stray").write_bytes(b"x"),
    "a folder with a file": lambda files: (files / "other").mkdir() or (files / "other" / "stray").write_bytes(b"x"),
    "a link": lambda files: (files / "stray").symlink_to("large.h5"),
    "a pipe": lambda files: os.mkfifo(files / "stray"),
    "a pipe in place of a file": lambda files: (files / "large.h5").unlink() or os.mkfifo(files / "large.h5"),
    "a folder in place of a file": lambda files: (files / "large.h5").unlink() or (files / "large.h5").mkdir(),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stray", STRAYS)
def test_a_partial_that_holds_something_else_is_completed(tmp_path, stray):
    source, manifest = make_set(tmp_path)
    begin_partial(source, manifest, tmp_path / "cache")
    (files,) = (tmp_path / "cache").glob("manifest/.*/files")
    STRAYS[stray](files)
    assert tree_of(stage_set(manifest, source, tmp_path / "cache").files) == tree_of(source)
    assert left_in(tmp_path / "cache") == []


def test_a_file_that_is_listed_twice_is_refused_before_anything_is_published(tmp_path):
    source, manifest = make_set(tmp_path)
    text = manifest.read_text().splitlines(keepends=True)
    line = next(number for number, each in enumerate(text) if '"small/deep/empty"' in each)
    text[-1] = text[-1].replace('"files": 14', '"files": 15')
    manifest.write_text("".join([*text[:line], text[line], *text[line:]]))
    with pytest.raises(SpecError, match=rf"set\.jsonl:{line + 2}: path: 'small/deep/empty' is listed twice"):
        stage_set(manifest, source, tmp_path / "cache")
    assert published(tmp_path / "cache") == []


def test_no_room(tmp_path):
    source, manifest = make_set(tmp_path)
    with pytest.raises(DataError, match="no room for set"):
        stage_set(manifest, source, tmp_path / "cache", quota_bytes=1000)
    assert left_in(tmp_path / "cache") == []


def test_a_cache_of_somebody_else_is_refused(tmp_path):
    source, manifest = make_set(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(DataError, match="can be changed by others"):
        stage_set(manifest, source, tmp_path / "cache")


def test_a_folder_of_a_web_server(tmp_path, site: Site):
    source, manifest = make_set(tmp_path)
    for name, body in tree_of(source).items():
        site.put(f"/set/{name}", body)
    assert tree_of(stage_set(manifest, f"{site.url}/set", tmp_path / "cache").files) == tree_of(source)


BODY = os.urandom(300_000)
KNOWN = hashlib.sha256(BODY).hexdigest()


@pytest.mark.parametrize(
    "quirks",
    [
        [breaks_after(100_000, reset=True)],
        [answers(503), answers(429)],
        [breaks_after(100_000), ignores_range()],
    ],
    ids=["reset", "busy", "no ranges"],
)
def test_a_bad_web_server(tmp_path, site: Site, quirks):
    url = site.put("/x", BODY, *quirks)
    assert stage(Item("x", url, KNOWN), tmp_path / "cache").path.read_bytes() == BODY


def test_the_web_is_asked_once(tmp_path, site: Site):
    assert stage(Item("x", site.put("/x", BODY), KNOWN), tmp_path / "cache").path.read_bytes() == BODY
    assert len(site.seen) == 1


def test_a_web_server_that_does_not_say_how_long_the_file_is(tmp_path, site: Site):
    site.repeat_last = True
    item = Item("x", site.put("/x", BODY, chunked()), KNOWN)
    assert stage(item, tmp_path / "cache").path.read_bytes() == BODY
    count = len(site.seen)
    assert stage(item, tmp_path / "cache").path.read_bytes() == BODY
    assert len(site.seen) == count


def test_a_web_server_that_says_no(tmp_path, site: Site):
    with pytest.raises(DataError, match="404"):
        stage(Item("x", f"{site.url}/x", KNOWN), tmp_path / "cache")


def test_another_file_on_the_web(tmp_path, site: Site):
    with pytest.raises(IntegrityError, match="sha256 of the 300000 bytes"):
        stage(Item("x", site.put("/x", BODY), "0" * 64), tmp_path / "cache")


def test_anything_that_fsspec_opens(tmp_path):
    import fsspec

    source, manifest = make_set(tmp_path)
    memory = fsspec.filesystem("memory")
    for name, body in tree_of(source).items():
        memory.pipe(f"/set/{name}", body)
    assert tree_of(stage_set(manifest, "memory://set", tmp_path / "cache").files) == tree_of(source)
    memory.pipe("/set/large.h5", b"short")
    with pytest.raises(DataError, match="has 5 bytes"):
        stage_set(manifest, "memory://set", tmp_path / "other")
    memory.rm("/set", recursive=True)
    with pytest.raises(DataError, match="cannot read memory://set"):
        stage_set(manifest, "memory://set", tmp_path / "other")
    with pytest.raises(SpecError, match="nonsense"):
        stage_set(manifest, "nonsense://set", tmp_path / "other")


def test_what_could_not_be_staged_is_not_pinned(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"other bytes")
    with pytest.raises(IntegrityError):
        stage(Item("data.bin", str(tmp_path / "data.bin"), "cd" * 32), tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if "cdcd" in path.name] == []
