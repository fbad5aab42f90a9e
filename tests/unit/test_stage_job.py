"""From a job to files on a node: a manifest, files beside it, members of archives."""

import hashlib
import io
import os
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
from staging_samples import left_in

from hpcutils.errors import ArchiveError, DataError, IntegrityError, SpecError
from hpcutils.specs.job import DataFile, load_job
from hpcutils.staging import cache, store
from hpcutils.staging.find import find_files
from hpcutils.staging.leaders import Leaders
from hpcutils.staging.manifest import write_manifest
from hpcutils.staging.plan import RESERVE_BYTES
from hpcutils.staging.want import listed_in
from hpcutils.train.stager import Found, stage

BODIES = {"sets/train.h5": os.urandom(5000), "sets/more/readme": b"read me\n", "labels.h5": os.urandom(300)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCUTILS_NODE_CACHE", str(tmp_path / "cache"))
    job = tmp_path / "job"
    for name, body in BODIES.items():
        (job / name).parent.mkdir(parents=True, exist_ok=True)
        (job / name).write_bytes(body)
    (job / "model.py").write_text("def build(): ...\n")
    return job


def staged(folder: Path, files: str, x: str, staging: str = "{}"):
    """Stage what a train.yaml asks for; return the bytes by name and the sizes of the datasets."""
    (folder / "train.yaml").write_text(
        f"name: x\ndata: {{files: {files}, x: '{x}:a', y: '{x}:b'}}\nmodel: {{function: model.py:build}}\n"
        f"training: {{epochs: 1, batch_size: 1, loss: mse}}\nstaging: {staging}\n"
    )
    stage(load_job(folder / "train.yaml"), folder, Leaders(), found := Found())
    sizes = [coming.outcome.size_bytes for coming in found.comings]
    return {name: file.path.read_bytes() for name, file in found.staged.items()}, sizes


def test_a_manifest_and_a_file_beside_it(folder):
    write_manifest(find_files([folder / "sets"]), folder / "m.jsonl")
    found, sizes = staged(folder, "[{path: sets/train.h5}, {path: labels.h5}]", "train.h5", "{manifest: m.jsonl, source: sets}")
    assert found == {"train.h5": BODIES["sets/train.h5"], "labels.h5": BODIES["labels.h5"]}
    assert sizes == [5008, 300]


def test_a_manifest_and_a_job_that_contradict_each_other(folder):
    write_manifest(find_files([folder / "sets"]), folder / "m.jsonl")
    files = f"[{{path: sets/train.h5, sha256: {'a' * 64}}}]"
    with pytest.raises(IntegrityError, match=r"train\.yaml and m\.jsonl name different sha256"):
        staged(folder, files, "train.h5", "{manifest: m.jsonl, source: sets}")


def test_a_file_that_fsspec_opens(folder):
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/far.h5", b"far away")
    files = f"[{{url: 'memory://bucket/far.h5', sha256: {hashlib.sha256(b'far away').hexdigest()}}}]"
    assert staged(folder, files, "far.h5")[0] == {"far.h5": b"far away"}


TWINS = {"a/train.h5": b"a's", "b/train.h5": b"b's", "a/c/train.h5": b"c's"}


def twins(folder: Path, *names: str) -> None:
    """Make files of one name in several folders, and a manifest of those `names`."""
    for name, body in TWINS.items():
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "set" / name).write_bytes(body)
    places = [folder / "set" / name for name in names]
    found = [file for file in find_files([folder / "set"]) if folder / "set" / file.name in places]
    write_manifest(found, folder / "m.jsonl")


@pytest.mark.parametrize("name", TWINS)
def test_of_two_files_of_a_name_the_one_of_the_same_path_is_taken(folder, name):
    twins(folder, *TWINS)
    found, sizes = staged(folder, f"[{{path: set/{name}}}]", "train.h5", "{manifest: m.jsonl, source: set}")
    assert (found, len(sizes)) == ({"train.h5": TWINS[name]}, 1)


def test_a_file_of_the_same_name_in_another_folder_is_another_file(folder):
    twins(folder, "b/train.h5")
    found, sizes = staged(folder, "[{path: set/a/train.h5}]", "train.h5", "{manifest: m.jsonl, source: set}")
    assert (found, len(sizes)) == ({"train.h5": TWINS["a/train.h5"]}, 2)


def test_a_name_that_may_mean_two_files_is_refused(folder):
    twins(folder, "a/train.h5", "b/train.h5")
    (folder / "train.h5").write_bytes(b"which?")
    with pytest.raises(SpecError, match=r"train\.h5: m\.jsonl lists 'a/train\.h5' and 'b/train\.h5'"):
        staged(folder, "[{path: train.h5}]", "train.h5", "{manifest: m.jsonl, source: set}")


@pytest.mark.parametrize("name", ["caf\u00e9.h5", os.fsdecode(b"caf\xe9.h5"), 'a"quote.h5', "plain.h5"])
def test_files_are_found_in_a_manifest_whatever_they_are_called(tmp_path, name):
    (tmp_path / "set" / "in").mkdir(parents=True)
    (tmp_path / "set" / "in" / name).write_bytes(b"x")
    made = write_manifest(find_files([tmp_path / "set"]), tmp_path / "m.jsonl")
    files = (DataFile(path=f"in/{name}"),) if name.isprintable() else (DataFile.model_construct(path=f"in/{name}"),)
    assert [path for path, _ in listed_in(made.path, files).values()] == [f"in/{name}"]


def tar(folder: Path, link: bool = True) -> str:
    with tarfile.open(folder / "set.tar.gz", "w:gz") as archive:
        archive.add(folder / "sets", "sets")
        if link:
            info = tarfile.TarInfo("latest")
            info.type, info.linkname = tarfile.SYMTYPE, "sets"
            archive.addfile(info)
    return hashlib.sha256((folder / "set.tar.gz").read_bytes()).hexdigest()


@pytest.mark.parametrize("verify", ["false", "true"])
def test_a_member_of_an_archive(folder, verify):
    digest = tar(folder)
    files = f"[{{path: set.tar.gz, sha256: {digest}, extract: sets/train.h5}}]"
    for _ in range(2):
        found, _ = staged(folder, files, "train.h5", f"{{verify: {verify}}}")
        assert found == {"train.h5": BODIES["sets/train.h5"]}
    root = folder.parent / "cache"
    assert [kept.kind for kept in cache.kept_in(root)] == ["sha256", "unpacked"]
    assert [cache.verify(root, kept).wrong for kept in cache.kept_in(root)] == [(), ()]
    (member,) = root.glob("unpacked/*/files/sets/train.h5")
    member.write_bytes(b"changed")
    assert staged(folder, files, "train.h5")[0] == found
    assert left_in(root) == []


def test_the_content_of_an_archive_is_not_taken_from_a_running_job(folder, monkeypatch):
    digest = tar(folder)
    files = f"[{{path: set.tar.gz, sha256: {digest}, extract: sets/train.h5}}]"
    found, _ = staged(folder, files, "train.h5")
    root = folder.parent / "cache"
    (member,) = root.glob("unpacked/*/files/sets/train.h5")
    monkeypatch.setattr(cache, "is_used_by_others", lambda place: True)
    inode = member.stat().st_ino
    os.utime(member)
    assert staged(folder, files, "train.h5")[0] == found
    assert member.stat().st_ino == inode
    discarded, honest = [], store.discard
    monkeypatch.setattr(store, "discard", lambda path, place: discarded.append(path.name) or honest(path, place))
    member.write_bytes(b"changed")
    assert staged(folder, files, "train.h5")[0] == found
    # What is thrown away had lost its name to the new one before.
    assert len(discarded) == 1
    assert discarded[0].startswith(".")
    assert left_in(root) == []


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_with_a_member_twice_holds_the_later_one(folder, kind):
    name = f"set.{kind}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with tarfile.open(folder / name, "w") if kind == "tar" else zipfile.ZipFile(folder / name, "w") as archive:
            for path in ("labels.h5", "sets/train.h5"):
                (archive.add if kind == "tar" else archive.write)(folder / path, "in/x.h5")
    files = f"[{{path: {name}, extract: in/x.h5}}]"
    for _ in range(2):
        assert staged(folder, files, "x.h5")[0] == {"x.h5": BODIES["sets/train.h5"]}
    assert [cache.verify(folder.parent / "cache", kept).wrong for kept in cache.kept_in(folder.parent / "cache")] == [(), ()]


def big_archive(folder: Path, kind: str) -> tuple[str, int]:
    """Return the name and size of an archive of a member of 300,000 bytes that packs well."""
    (folder / "big.h5").write_bytes(bytes(300_000))
    name = {"tar": "set.tar", "gz": "set.tar.gz", "zip": "set.zip"}[kind]
    if kind == "zip":
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as pack:
            pack.write(folder / "big.h5", "in/x.h5")
    else:
        with tarfile.open(folder / name, "w:gz" if kind == "gz" else "w") as archive:
            archive.add(folder / "big.h5", "in/x.h5")
    return name, (folder / name).stat().st_size


@pytest.mark.parametrize("kind", ["tar", "gz", "zip"])
def test_what_an_archive_holds_must_have_room(folder, kind):
    name, size = big_archive(folder, kind)
    files, root = f"[{{path: {name}, extract: in/x.h5}}]", folder.parent / "cache"
    with pytest.raises(DataError, match=rf"no room for {name}, unpacked"):
        staged(folder, files, "x.h5", f"{{quota_gb: {(size + 299_000) / 1e9}}}")
    assert [kept.kind for kept in cache.kept_in(root)] == ["stat"]
    assert left_in(root) == []
    assert staged(folder, files, "x.h5", f"{{quota_gb: {(size + 320_000) / 1e9}}}")[0] == {"x.h5": bytes(300_000)}


@pytest.mark.parametrize("kind", ["tar", "gz", "zip"])
def test_what_an_archive_holds_makes_room(folder, kind):
    name, size = big_archive(folder, kind)
    root = folder.parent / "cache"
    (folder / "old.h5").write_bytes(b"o" * 100_000)
    staged(folder, "[{path: old.h5}]", "old.h5")
    for kept in cache.kept_in(root):
        cache.unpin(store.Place(root, kept.kind, kept.key))
    staged(folder, f"[{{path: {name}, extract: in/x.h5}}]", "x.h5", f"{{quota_gb: {(size + 350_000) / 1e9}}}")
    assert sorted(kept.name for kept in cache.kept_in(root)) == [name, name]


def test_an_archive_that_is_too_much_for_the_disk_stops_before_it_is_full(folder, monkeypatch):
    name, _ = big_archive(folder, "gz")
    monkeypatch.setattr(cache, "disk_of", lambda root: (RESERVE_BYTES + 100_000, 4096, None))
    with pytest.raises(DataError, match="no room: the archive claims 300000 bytes"):
        staged(folder, f"[{{path: {name}, extract: in/x.h5}}]", "x.h5")
    assert left_in(folder.parent / "cache") == []


def test_an_archive_that_a_manifest_lists(folder):
    with zipfile.ZipFile(folder / "sets" / "set.zip", "w") as archive:
        archive.write(folder / "labels.h5", "in/labels.h5")
    write_manifest(find_files([folder / "sets"]), folder / "m.jsonl")
    found, _ = staged(folder, "[{path: sets/set.zip, extract: in/labels.h5}]", "labels.h5", "{manifest: m.jsonl, source: sets}")
    assert found == {"labels.h5": BODIES["labels.h5"]}


def test_a_member_that_is_not_there(folder):
    tar(folder)
    with pytest.raises(DataError, match=r"set\.tar\.gz has no member 'sets/other\.h5'") as caught:
        staged(folder, "[{path: set.tar.gz, extract: sets/other.h5}]", "other.h5")
    assert caught.value.hint == "it has, among others: sets/train.h5"


def test_a_hostile_or_damaged_archive_leaves_nothing(folder):
    with tarfile.open(folder / "set.tar", "w") as archive:
        info = tarfile.TarInfo("../../outside")
        archive.addfile(info, io.BytesIO())
    (folder / "no.zip").write_bytes(b"PK\3\4 and no more")
    for name in ("set.tar", "no.zip"):
        with pytest.raises(ArchiveError):
            staged(folder, f"[{{path: {name}, extract: outside}}]", "outside")
        assert list((folder.parent / "cache" / "unpacked").glob("*")) == []
    assert not (folder.parent / "outside").exists()


def test_what_a_killed_job_left_of_an_archive_is_removed(folder):
    digest = tar(folder)
    root = folder.parent / "cache"
    left = root / "unpacked" / f".{digest}{store.PART}{os.uname().nodename}-0-0-none-00000000"
    (left / "files").mkdir(parents=True)
    staged(folder, f"[{{path: set.tar.gz, sha256: {digest}, extract: sets/train.h5}}]", "train.h5")
    assert left_in(root) == []
