"""`get_file`: the cache, the checks before anything is published, and archives beside other people's files."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import os
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servers import Site, breaks_after, names_in, serving, slow

from hpcutils import fs
from hpcutils.errors import ArchiveError, DataError, IntegrityError, SpecError
from hpcutils.staging import get_file as module
from hpcutils.staging.archive import unpack
from hpcutils.staging.get_file import FileRequest, extract_once, get_file, plan_download
from hpcutils.staging.members import Limits
from hpcutils.staging.progress import Bar, Lines, progress_for
from hpcutils.staging.settle import deliver, plan_parcel, scratch
from hpcutils.staging.turn import lock_path, marker_path

BODY = b"0123456789" * 10_000
HASHES = {name: hashlib.new(name, BODY).hexdigest() for name in ("md5", "sha1", "sha256", "sha512")}


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a proxy of this machine out of the way to this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds the files; `$KERAS_HOME` is the one above."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    return tmp_path / "keras" / "datasets"


def tar_of(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as pack:
        for name, content in files.items():
            pack.writestr(name, content)
    return out.getvalue()


def tree_of(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder`, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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

    @pytest.mark.parametrize("fname", ["", "folder/"])
    def test_a_name_of_nothing(self, cache: Path, fname: str) -> None:
        with pytest.raises(SpecError):
            get_file(fname, "http://127.0.0.1/x")

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

    def test_and_is_not_lost_when_that_fails(self, site: Site, cache: Path) -> None:
        cache.mkdir(parents=True)
        (cache / "x.bin").write_bytes(b"old")
        with pytest.raises(DataError, match="404"):
            get_file("x.bin", site.url + "/missing", file_hash=HASHES["sha256"])
        with pytest.raises(IntegrityError):
            get_file("x.bin", site.put("/x", BODY + b"!"), file_hash=HASHES["sha256"])
        assert tree_of(cache) == {"x.bin": b"old"}

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


class TestArchives:
    def test_untar_gives_the_folder(self, site: Site, cache: Path) -> None:
        path = get_file("pictures", site.put("/p", tar_of({"pictures/a.txt": b"a", "pictures/b/c.txt": b"c"})), untar=True)
        assert path == str(cache / "pictures")
        assert (cache / "pictures" / "b" / "c.txt").read_bytes() == b"c"
        assert (cache / "pictures.tar.gz").read_bytes() == site.files["/p"]

    def test_untar_of_another_folder_gives_the_old_answer_and_a_word(
        self, site: Site, cache: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = get_file("aclImdb_v1", site.put("/p", tar_of({"aclImdb/README": b"r"})), untar=True)
        assert path == str(cache / "aclImdb_v1")
        assert "no folder of this name" in caplog.text
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
        self, site: Site, cache: Path, archive_format: list[str] | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = get_file("x", site.put("/p", tar_of({"a": b"a"})), extract=True, archive_format=archive_format)
        assert path == str(cache / "x")
        assert "no match found" in caplog.text
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


class TestManyCalls:
    def test_threads_share_one_download(self, site: Site, cache: Path) -> None:
        url = site.put("/p", tar_of({"d/a": BODY}), slow(0.2))
        run_together([lambda: get_file("x.tar.gz", url, extract=True)] * 4)
        assert len(site.seen) == 1
        assert (cache / "d" / "a").read_bytes() == BODY
        assert names_in(cache) == [".x.tar.gz.extracted", "d", "x.tar.gz"]

    def test_without_locks_all_are_right(self, site: Site, cache: Path) -> None:
        files = {f"{top}/{number}": bytes([number]) * 100 for top in "abcdef" for number in range(20)}
        target = cache / "x.tar.gz"
        request = FileRequest(site.put("/p", tar_of(files)), target, target, None, "sha256", ("tar",))
        # What `run_request` does when the lock is granted to everybody.
        run_together([lambda: module._complete(request)] * 4)
        assert len(site.seen) >= 1
        found = tree_of(cache)
        assert found.pop("x.tar.gz") and found.pop(".x.tar.gz.extracted")
        assert found == files

    def test_two_that_planned_the_same_moves_are_both_right(self, cache: Path) -> None:
        cache.mkdir(parents=True)
        target = cache / "x.tar"
        files = {"a": b"a", "d/b": b"b", "d/e/c": b"c"}
        target.write_bytes(tar_of(files, "w"))
        with scratch(target) as first, scratch(target) as second:
            names = [unpack(target, tree, ("tar",), Limits(1 << 20)) for tree in (first, second)]
            parcels = [plan_parcel(tree, target, made) for tree, made in zip((first, second), names, strict=True)]
            assert parcels[0].moves == parcels[1].moves == ("a", "d")
            deliver(parcels[0])
            deliver(parcels[1])
        found = tree_of(cache)
        assert found.pop("x.tar") and found.pop(".x.tar.extracted")
        assert found == files

    def test_a_lock_without_a_name_keeps_nobody_out(self, site: Site, cache: Path) -> None:
        # Who had the lock before removes its file; who waited on that file must not believe that it has the lock now.
        cache.mkdir(parents=True)
        lock = lock_path(cache / "x")
        thread = threading.Thread(target=get_file, args=("x", site.put("/x", BODY)))
        with lock.open("w") as first:
            fcntl.flock(first, fcntl.LOCK_EX)
            thread.start()
            time.sleep(0.1)
            lock.unlink()
            with lock.open("w") as second:
                fcntl.flock(second, fcntl.LOCK_EX)
                first.close()
                thread.join(0.2)
                assert thread.is_alive() and site.seen == []
        thread.join()
        assert tree_of(cache)["x"] == BODY


def run_together(calls: list[Callable[[], object]]) -> None:
    """Run the calls at the same moment, and raise what one of them raised."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> None:
        barrier.wait()
        call()

    with ThreadPoolExecutor(len(calls)) as pool:
        for done in [pool.submit(run, call) for call in calls]:
            done.result()


class TestDebris:
    @pytest.fixture
    def dead_pid(self) -> int:
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        return child.pid

    def temporary(self, target: Path, host: str, pid: int, age_s: float = 0) -> Path:
        path = target.with_name(f".{target.name}{fs.TEMPORARY_MARK}{host}-{pid}-0123abcd")
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age_s,) * 2)
        return path

    def test_what_a_dead_process_left_is_removed(self, site: Site, cache: Path, dead_pid: int) -> None:
        cache.mkdir(parents=True)
        for target in (cache / "x", marker_path(cache / "x")):
            self.temporary(target, socket.gethostname(), dead_pid)
        folder = fs.temporary_beside(cache / "x")
        folder = folder.with_name(folder.name.replace(str(os.getpid()), str(dead_pid)))
        (folder / "deep").mkdir(parents=True)
        lock_path(cache / "x").touch()
        get_file("x", site.put("/x", BODY))
        assert tree_of(cache) == {"x": BODY}
        assert names_in(cache) == ["x"]

    def test_also_when_the_file_is_there(self, cache: Path, dead_pid: int) -> None:
        cache.mkdir(parents=True)
        (cache / "x").write_bytes(BODY)
        self.temporary(cache / "x", socket.gethostname(), dead_pid)
        lock_path(cache / "x").touch()
        get_file("x", "http://127.0.0.1/x")
        assert names_in(cache) == ["x"]

    def test_a_dead_process_that_nobody_waited_for_is_dead(self, site: Site, cache: Path) -> None:
        cache.mkdir(parents=True)
        child = subprocess.Popen([sys.executable, "-c", ""])
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        self.temporary(cache / "x", socket.gethostname(), child.pid)
        get_file("x", site.put("/x", BODY))
        child.wait()
        assert names_in(cache) == ["x"]

    def test_what_somebody_may_still_write_stays_for_a_day(self, site: Site, cache: Path) -> None:
        cache.mkdir(parents=True)
        alive = self.temporary(cache / "x", socket.gethostname(), os.getppid())
        distant = self.temporary(cache / "x", "another-host", 1, age_s=3600)
        old = self.temporary(cache / "x", "another-host", 2, age_s=25 * 3600)
        other = self.temporary(cache / "x2", "another-host", 2, age_s=25 * 3600)
        get_file("x", site.put("/x", BODY))
        assert alive.exists() and distant.exists() and other.exists()
        assert not old.exists()


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


def test_a_gzip_of_a_single_file_is_not_an_archive(site: Site, cache: Path) -> None:
    with pytest.raises(ArchiveError, match="not a tar or zip"):
        get_file("labels.gz", site.put("/l", gzip.compress(BODY)), extract=True)
