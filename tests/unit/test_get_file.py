"""`get_file`: the cache, the checks before anything is published, and archives beside other people's files."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from get_file_samples import tar_of, tree_of
from servers import Site, breaks_after, serving

from hpcutils.errors import ArchiveError, DataError, IntegrityError, SpecError
from hpcutils.staging.get_file import FileRequest, get_file, plan_download
from hpcutils.staging.progress import Bar, Lines, progress_for

BODY = b"0123456789" * 10_000
HASHES = {name: hashlib.new(name, BODY).hexdigest() for name in ("md5", "sha1", "sha256", "sha512")}


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds the files; `$KERAS_HOME` is the one above."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    return tmp_path / "keras" / "datasets"


class TestPlaces:
    def test_keras_home(self, site: Site, cache: Path) -> None:
        path = get_file("x.bin", site.put("/x", BODY))
        assert path == str(cache / "x.bin")
        assert tree_of(cache) == {"x.bin": BODY}

    def test_home_without_keras_home(self, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KERAS_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert get_file("x.bin", site.put("/x", BODY)) == str(tmp_path / ".keras" / "datasets" / "x.bin")

    def test_cache_dir_with_a_tilde(self, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        path = get_file("x.bin", site.put("/x", BODY), cache_dir="~/a", cache_subdir="b")
        assert path == str(tmp_path / "a" / "b" / "x.bin")

    def test_absolute_fname(self, site: Site, tmp_path: Path) -> None:
        path = str(tmp_path / "new" / "x.bin")
        assert get_file(path, site.put("/x", BODY), cache_dir="/proc/no") == path
        assert Path(path).read_bytes() == BODY

    def test_absolute_cache_subdir(self, site: Site, tmp_path: Path) -> None:
        path = get_file("x.bin", site.put("/x", BODY), cache_dir="/proc/no", cache_subdir=str(tmp_path / "s"))
        assert path == str(tmp_path / "s" / "x.bin")

    def test_a_cache_that_cannot_be_made_is_an_error(self, site: Site, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match="cannot put") as caught:
            get_file("x.bin", site.put("/x", BODY), cache_dir=tmp_path / "file" / "cache")
        assert "cache_dir" in str(caught.value)
        assert site.seen == []

    @pytest.mark.parametrize("fname", ["", "folder/", "x\0.bin", "../x.bin", "a/../../x.bin"])
    def test_a_name_of_nothing_or_of_elsewhere(self, cache: Path, fname: str) -> None:
        with pytest.raises(SpecError):
            get_file(fname, "http://127.0.0.1/x")

    @pytest.mark.parametrize("where", ["cache_subdir", "cache_dir"])
    def test_a_folder_with_a_nul(self, cache: Path, where: str) -> None:
        with pytest.raises(SpecError, match="NUL"):
            get_file("x.bin", "http://127.0.0.1/x", **{where: "a\0b"})

    @pytest.mark.parametrize("name", ["n" * 240, "n" * 255, "\u00e9" * 120, "n" * 200 + ".tar.gz"])
    def test_long_names(self, site: Site, cache: Path, name: str) -> None:
        packed = tar_of({"a": b"a"})
        for _ in range(2):
            get_file(name, site.put("/x", packed), extract=True, file_hash=hashlib.sha256(packed).hexdigest())
        assert len(site.seen) == 1
        found = {key: value for key, value in tree_of(cache).items() if not key.endswith(".extracted")}
        assert found == {name: packed, "a": b"a"}

    def test_a_name_that_is_too_long_for_the_disk(self, site: Site, cache: Path) -> None:
        with pytest.raises(DataError, match="File name too long"):
            get_file("n" * 256, site.put("/x", BODY))

    def test_a_path_as_origin(self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "x.bin").write_bytes(BODY)
        monkeypatch.chdir(tmp_path)
        get_file("x.bin", "there/x.bin")
        get_file("y.bin", tmp_path / "there" / "x.bin")
        assert tree_of(cache) == {"x.bin": BODY, "y.bin": BODY}

    def test_a_failure_leaves_no_new_folder(self, site: Site, cache: Path, tmp_path: Path) -> None:
        hostile = site.put("/p", tar_of({"../a": b"a"}))
        with pytest.raises(ArchiveError):
            get_file("x.tar.gz", hostile, extract=True, cache_subdir="new/deep")
        with pytest.raises(DataError, match="404"):
            get_file("x.bin", site.url + "/missing")
        assert not (tmp_path / "keras").exists()
        cache.mkdir(parents=True)
        with pytest.raises(ArchiveError):
            get_file("x.tar.gz", hostile, extract=True, cache_subdir="datasets/new")
        assert list(cache.iterdir()) == []
        assert cache.is_dir(), "a folder that was there stays"

    def test_a_folder_in_the_way(self, cache: Path) -> None:
        (cache / "x.bin").mkdir(parents=True)
        with pytest.raises(DataError, match="is a folder"):
            get_file("x.bin", "http://127.0.0.1/x")


class TestCache:
    def test_the_second_call_asks_nobody(self, site: Site, cache: Path) -> None:
        url = site.put("/x", BODY)
        assert get_file("x.bin", url, file_hash=HASHES["sha256"]) == get_file("x.bin", url, file_hash=HASHES["sha256"])
        assert len(site.seen) == 1

    def test_a_file_without_a_hash_is_taken_as_it_is(self, site: Site, cache: Path) -> None:
        cache.mkdir(parents=True)
        (cache / "x.bin").write_bytes(b"whatever")
        get_file("x.bin", site.put("/x", BODY))
        assert tree_of(cache) == {"x.bin": b"whatever"}
        assert site.seen == []

    def test_a_file_with_another_hash_is_fetched_again(self, site: Site, cache: Path) -> None:
        cache.mkdir(parents=True)
        (cache / "x.bin").write_bytes(b"old")
        get_file("x.bin", site.put("/x", BODY), file_hash=HASHES["sha256"])
        assert tree_of(cache) == {"x.bin": BODY}

    def test_and_is_not_lost_when_the_origin_cannot_be_had(self, site: Site, cache: Path) -> None:
        cache.mkdir(parents=True)
        (cache / "x.bin").write_bytes(b"old")
        with pytest.raises(DataError, match="404"):
            get_file("x.bin", site.url + "/missing", file_hash=HASHES["sha256"])
        assert tree_of(cache) == {"x.bin": b"old"}

    @pytest.mark.parametrize("extract", [False, True])
    def test_a_wrong_file_goes_when_the_origin_has_another_wrong_one(self, site: Site, cache: Path, extract: bool) -> None:
        cache.mkdir(parents=True)
        (cache / "x.bin").write_bytes(b"old")
        url = site.put("/x", BODY + b"!")
        with pytest.raises(IntegrityError):
            get_file("x.bin", url, file_hash=HASHES["sha256"], extract=extract)
        assert tree_of(cache) == {}
        get_file("x.bin", site.put("/y", BODY))
        assert tree_of(cache) == {"x.bin": BODY}, "a call without a digest does not meet the wrong file"

    def test_a_broken_connection_is_continued(self, site: Site, cache: Path) -> None:
        get_file("x.bin", site.put("/x", BODY, breaks_after(70_000)))
        assert site.ranges() == [None, "bytes=70000-"]
        assert tree_of(cache) == {"x.bin": BODY}

    def test_the_plan(self) -> None:
        target = Path("/c/x")
        bare = FileRequest("http://h/x", target, target, None, "sha256", ())
        hashed = FileRequest("http://h/x", target, target, HASHES["md5"], "md5", ())
        actions = [plan_download(request, exists).action for request in (bare, hashed) for exists in (False, True)]
        assert actions == ["fetch", "present", "fetch", "verify"]


class TestHashes:
    def test_a_wrong_one_on_the_first_download_publishes_nothing(self, site: Site, cache: Path) -> None:
        with pytest.raises(ValueError, match="0000") as caught:
            get_file("x.bin", site.put("/x", BODY), file_hash="0" * 64)
        assert isinstance(caught.value, IntegrityError)
        assert tree_of(cache) == {}

    @pytest.mark.parametrize("algorithm", HASHES)
    @pytest.mark.parametrize("change", [str.lower, str.upper])
    def test_auto_picks_by_length_in_either_case(
        self, site: Site, cache: Path, algorithm: str, change: Callable[[str], str]
    ) -> None:
        for _ in "download", "verify":
            get_file("x.bin", site.put("/x", BODY), file_hash=change(HASHES[algorithm]))
        assert len(site.seen) == 1
        wrong = change(HASHES[algorithm][::-1])
        with pytest.raises(IntegrityError):
            get_file("x.bin", site.put("/x", BODY), file_hash=wrong)

    def test_md5_hash(self, site: Site, cache: Path) -> None:
        get_file("x.bin", site.put("/x", BODY), md5_hash=HASHES["md5"], hash_algorithm="sha256")
        with pytest.raises(IntegrityError):
            get_file("y.bin", site.put("/x", BODY), md5_hash=HASHES["md5"][::-1])

    def test_file_hash_goes_before_md5_hash(self, site: Site, cache: Path) -> None:
        get_file("x.bin", site.put("/x", BODY), md5_hash="0" * 32, file_hash=HASHES["sha256"])

    @pytest.mark.parametrize(
        ("digest", "algorithm"),
        [("ab" * 20 + "c", "auto"), ("", "auto"), ("0" * 32, "sha256"), ("z" * 64, "auto"), (None, "x")],
    )
    def test_what_is_no_digest(self, site: Site, cache: Path, digest: str | None, algorithm: str) -> None:
        with pytest.raises(SpecError):
            get_file("x.bin", site.put("/x", BODY), file_hash=digest, hash_algorithm=algorithm)
        assert site.seen == []


class TestProgress:
    def test_plain_lines_in_a_log(self, site: Site, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        get_file("x.bin", site.put("/x", BODY))
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines()[0] == f"fetching {site.url}/x"
        assert "x.bin: 0.1 of 0.1 MiB (100%)" in err
        assert "\r" not in err

    def test_a_bar_on_a_terminal(self) -> None:
        outer, inner = os.openpty()
        with os.fdopen(outer, "rb", buffering=0) as screen, os.fdopen(inner, "w") as terminal:
            bar = progress_for("x.bin", "fetching x", terminal)
            assert isinstance(bar, Bar)
            bar.update(1 << 20, 4 << 20)
            bar.close()
            text = ""
            while text.count("\n") < 2:
                text += screen.read(4096).decode()
        assert "\rx.bin [######..................] 1.0 of 4.0 MiB (25%)" in text
        assert text.endswith("\n")

    def test_a_length_that_nobody_knows(self) -> None:
        stream = io.StringIO()
        lines = Lines("x", stream)
        lines.update(3 << 20, None)
        lines.close()
        assert stream.getvalue().startswith("x: 3.0 MiB, ")

    def test_a_log_gets_a_line_now_and_then(self) -> None:
        stream = io.StringIO()
        lines = Lines("x", stream)
        lines.every_s = 0.02
        for _ in range(3):
            lines.update(1, 10)
        time.sleep(0.03)
        lines.update(5, 10)
        assert stream.getvalue().count("\n") == 1


def test_the_import_is_light() -> None:
    heavy = "ssl, http.client, urllib.request, tarfile, zipfile, numpy, keras, tensorflow, h5py"
    code = f"import sys, hpcutils.staging.get_file; print([m for m in {heavy.split(', ')} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_example_of_the_reference_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "get_file.md"
    example = re.findall(r"^```python\n(.*?)^```", page.read_text().split("## Example")[1], re.MULTILINE | re.DOTALL)[0]
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)
    assert done.stdout == "cat\ndog\n\n"
