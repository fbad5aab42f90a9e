"""`get_file` called by several at once, with locks and without, and after calls that were killed."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from get_file_samples import tar_of, tree_of
from servers import Site, names_in, serving, slow

from hpcutils import fs
from hpcutils.staging import get_file as module
from hpcutils.staging.archive import unpack
from hpcutils.staging.get_file import FileRequest, get_file
from hpcutils.staging.members import Limits
from hpcutils.staging.settle import deliver, plan_parcel, scratch
from hpcutils.staging.turn import lock_path, marker_path

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
