"""`get_file` and archives: beside other people's files, once, and not at all when something is wrong."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from get_file_samples import tar_of, tree_of, zip_of
from servers import Site, names_in, serving

from hpcutils import fs
from hpcutils.errors import ArchiveError, SpecError
from hpcutils.log import LOGGER
from hpcutils.staging.get_file import extract_once, get_file
from hpcutils.staging.members import Limits

BODY = b"0123456789" * 10_000


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds the files; `$KERAS_HOME` is the one above."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    return tmp_path / "keras" / "datasets"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log, also after another test sent it to stderr alone."""
    LOGGER.addHandler(caplog.handler)
    yield caplog
    LOGGER.removeHandler(caplog.handler)


class TestArchives:
    def test_untar_gives_the_folder(self, site: Site, cache: Path) -> None:
        path = get_file("pictures", site.put("/p", tar_of({"pictures/a.txt": b"a", "pictures/b/c.txt": b"c"})), untar=True)
        assert path == str(cache / "pictures")
        assert (cache / "pictures" / "b" / "c.txt").read_bytes() == b"c"
        assert (cache / "pictures.tar.gz").read_bytes() == site.files["/p"]

    def test_untar_of_another_folder_gives_the_old_answer_and_a_word(
        self, site: Site, cache: Path, said: pytest.LogCaptureFixture
    ) -> None:
        path = get_file("aclImdb_v1", site.put("/p", tar_of({"aclImdb/README": b"r"})), untar=True)
        assert path == str(cache / "aclImdb_v1")
        assert "no folder of this name" in said.text
        assert (cache / "aclImdb" / "README").read_bytes() == b"r"

    @pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
    @pytest.mark.parametrize("archive_format", ["auto", "named", "list"])
    def test_extract_gives_the_file(self, site: Site, cache: Path, mode: str, archive_format: str) -> None:
        files = {"d/a.txt": b"a" * 100, "d/e/f.txt": b"f", "top.txt": b"t"}
        packed = zip_of(files) if mode == "zip" else tar_of(files, mode)
        name = "zip" if mode == "zip" else "tar"
        formats = {"auto": "auto", "named": name, "list": ["zip", "tar"]}[archive_format]
        path = get_file("x.pack", site.put("/p", packed), extract=True, archive_format=formats)
        assert path == str(cache / "x.pack")
        found = tree_of(cache)
        assert found.pop(".x.pack.extracted")
        assert found == {"x.pack": packed, **files}

    def test_it_is_done_once(self, site: Site, cache: Path) -> None:
        url = site.put("/p", tar_of({"d/a.txt": b"a"}))
        get_file("x.tar.gz", url, extract=True)
        (cache / "d" / "a.txt").write_bytes(b"edited")
        get_file("x.tar.gz", url, extract=True)
        assert (cache / "d" / "a.txt").read_bytes() == b"edited"

    def test_what_was_removed_comes_back(self, site: Site, cache: Path) -> None:
        url = site.put("/p", tar_of({"d/a.txt": b"a", "e/b.txt": b"b"}))
        get_file("x.tar.gz", url, extract=True)
        before = tree_of(cache)
        fs.remove(cache / "d")
        get_file("x.tar.gz", url, extract=True)
        assert tree_of(cache) == before
        assert len(site.seen) == 1

    def test_a_file_that_was_there_is_unpacked_when_asked(self, site: Site, cache: Path) -> None:
        url = site.put("/p", tar_of({"d/a.txt": b"a"}))
        get_file("x.tar.gz", url)
        assert not (cache / "d").exists()
        get_file("x.tar.gz", url, extract=True)
        assert (cache / "d" / "a.txt").exists()

    def test_a_new_version_replaces_its_own_files_only(self, site: Site, cache: Path) -> None:
        old, new = tar_of({"d/a": b"old", "d/b": b"b"}), tar_of({"d/a": b"new", "d/c": b"c"})
        get_file("x.tar.gz", site.put("/p", old), extract=True, file_hash=hashlib.md5(old).hexdigest())
        (cache / "d" / "mine").write_bytes(b"mine")
        get_file("x.tar.gz", site.put("/p", new), extract=True, file_hash=hashlib.md5(new).hexdigest())
        found = {name: content for name, content in tree_of(cache).items() if name.startswith("d/")}
        assert found == {"d/a": b"new", "d/b": b"b", "d/c": b"c", "d/mine": b"mine"}

    def test_folders_are_shared_between_archives(self, site: Site, cache: Path) -> None:
        get_file("train.zip", site.put("/a", zip_of({"d/train/a": b"a", "d/README": b"same"})), extract=True)
        get_file("test.zip", site.put("/b", zip_of({"d/test/b": b"b", "d/README": b"same"})), extract=True)
        assert tree_of(cache / "d") == {"train/a": b"a", "test/b": b"b", "README": b"same"}

    @pytest.mark.parametrize("there", ["file", "folder", "link"])
    def test_somebody_elses_file_is_not_touched(self, site: Site, cache: Path, tmp_path: Path, there: str) -> None:
        (cache / "d").mkdir(parents=True)
        (tmp_path / "outside").write_bytes(b"outside")
        place = cache / "d" / "b"
        if there == "file":
            place.write_bytes(b"precious")
        elif there == "folder":
            place.mkdir()
        else:
            place.symlink_to(tmp_path / "outside")
        before = tree_of(cache)
        with pytest.raises(ArchiveError, match="is there already"):
            get_file("x.tar.gz", site.put("/p", tar_of({"a": b"a", "d/b": b"new"})), extract=True)
        assert tree_of(cache) == before
        assert (tmp_path / "outside").read_bytes() == b"outside"

    def test_a_linked_folder_is_not_entered(self, site: Site, cache: Path, tmp_path: Path) -> None:
        cache.mkdir(parents=True)
        (tmp_path / "elsewhere").mkdir()
        (cache / "d").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ArchiveError):
            get_file("x.tar.gz", site.put("/p", tar_of({"d/b": b"new"})), extract=True)
        assert names_in(tmp_path / "elsewhere") == []

    @pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.gz/a", ".x.tar.gz.extracted", ".x.tar.gz.lock"])
    def test_a_member_cannot_take_the_archives_own_names(self, site: Site, cache: Path, name: str) -> None:
        with pytest.raises(ArchiveError, match="its own name"):
            get_file("x.tar.gz", site.put("/p", tar_of({name: b"forged"})), extract=True)
        assert tree_of(cache) == {}

    def test_a_damaged_one_is_not_kept_and_fetched_again(self, site: Site, cache: Path) -> None:
        good = tar_of({"d/a": b"a" * 5000})
        with pytest.raises(ArchiveError, match=r"^x\.tar\.gz is damaged"):
            get_file("x.tar.gz", site.put("/p", good[:-20]), extract=True)
        assert tree_of(cache) == {}
        get_file("x.tar.gz", site.put("/p", good), extract=True)
        assert (cache / "d" / "a").exists()

    def test_a_damaged_one_that_was_there_stays(self, site: Site, cache: Path) -> None:
        cache.mkdir(parents=True)
        (cache / "x.tar.gz").write_bytes(b"no archive")
        with pytest.raises(ArchiveError, match="not a tar or zip"):
            get_file("x.tar.gz", "http://127.0.0.1/x", extract=True)
        assert tree_of(cache) == {"x.tar.gz": b"no archive"}

    @pytest.mark.parametrize("archive_format", [None, []])
    def test_no_format_unpacks_nothing_and_says_so(
        self, site: Site, cache: Path, archive_format: list[str] | None, said: pytest.LogCaptureFixture
    ) -> None:
        path = get_file("x", site.put("/p", tar_of({"a": b"a"})), extract=True, archive_format=archive_format)
        assert path == str(cache / "x")
        assert "no match found" in said.text
        assert list(tree_of(cache)) == ["x"]

    def test_the_wrong_format(self, site: Site, cache: Path) -> None:
        with pytest.raises(ArchiveError, match="not a zip archive"):
            get_file("x", site.put("/p", tar_of({"a": b"a"})), extract=True, archive_format="zip")
        with pytest.raises(SpecError, match="rar"):
            get_file("x", site.put("/p", tar_of({"a": b"a"})), extract=True, archive_format="rar")
        assert tree_of(cache) == {}

    def test_extract_once_with_other_limits(self, site: Site, cache: Path) -> None:
        path = Path(get_file("x.tar.gz", site.put("/p", tar_of({"d/zeros": bytes(100_000)}))))
        with pytest.raises(ArchiveError, match="are allowed"):
            extract_once(path, limits=Limits(unpacked_bytes=50_000))
        assert list(tree_of(cache)) == ["x.tar.gz"]
        extract_once(path, limits=Limits(unpacked_bytes=200_000))
        assert (cache / "d" / "zeros").stat().st_size == 100_000


def test_a_gzip_of_a_single_file_is_not_an_archive(site: Site, cache: Path) -> None:
    with pytest.raises(ArchiveError, match="not a tar or zip"):
        get_file("labels.gz", site.put("/l", gzip.compress(BODY)), extract=True)
