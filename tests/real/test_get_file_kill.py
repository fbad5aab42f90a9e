"""kill -9 at each step of a call: the next one is right and clears what was left. And two processes at once."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# The server is shared with the unit tests, which are not a package.
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from servers import Site, names_in, serving, slow, stalls_after

from hpcutils.staging.get_file import get_file

BODY = os.urandom(1_500_000)
FILES = {"d/a": b"a" * 3000, "d/e/b": b"b", "top": b"t"}

# Audit events come before what they tell of. The child counts those that concern its cache or its lock, and kills itself at
# the one it was told: before the lock, the first byte, the flush, the rename, the removal of the lock …
CHILD = """
import os, signal, sys
from hpcutils.staging import archive, settle, web
from hpcutils.staging.get_file import get_file

fname, url, digest, cache, extract, last = sys.argv[1:]
seen = []

def hook(event, arguments):
    words = [os.fsdecode(word) for word in arguments if isinstance(word, (str, bytes, os.PathLike))]
    if event == "fcntl.flock" or (event.split(".")[0] in ("open", "os", "shutil") and any(cache in word for word in words)):
        seen.append(event)
        if len(seen) == int(last):
            os.kill(os.getpid(), 9)

sys.addaudithook(hook)
get_file(fname, url, file_hash=digest, extract=bool(int(extract)), cache_dir=cache)
print(*seen)
"""


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as running:
        yield running


def start(fname: str, url: str, body: bytes, cache: Path, extract: bool, last: int) -> subprocess.Popen[str]:
    digest = hashlib.sha256(body).hexdigest()
    argv = [sys.executable, "-c", CHILD, fname, url, digest, str(cache), str(int(extract)), str(last)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def run(*arguments: object) -> tuple[int, list[str]]:
    """Run the child to its end; return its code and the steps that it took."""
    child = start(*arguments)  # type: ignore[arg-type]
    out, _ = child.communicate(timeout=60)
    return child.returncode, out.split()


def packed() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(folder: Path, fname: str, body: bytes, extract: bool) -> None:
    """See that the file, what came out of it and its marker are there, and nothing else."""
    found = tree_of(folder)
    assert found.pop(fname) == body
    if extract:
        assert found.pop(f".{fname}.extracted")
        assert found == FILES
        assert names_in(folder) == [f".{fname}.extracted", "d", "top", fname]
    else:
        assert names_in(folder) == [fname]


@pytest.mark.parametrize("there", ["nothing", "another file"])
@pytest.mark.parametrize("extract", [False, True])
def test_kill_at_each_step(site: Site, tmp_path: Path, extract: bool, there: str) -> None:
    body = packed() if extract else BODY
    url = site.put("/x", body)

    def cache_for(step: int) -> Path:
        folder = tmp_path / str(step) / "datasets"
        folder.mkdir(parents=True)
        if there != "nothing":
            (folder / "x").write_bytes(b"another file")
        return folder.parent

    code, steps = run("x", url, body, cache_for(0), extract, 0)
    assert code == 0
    check(tmp_path / "0" / "datasets", "x", body, extract)
    assert {"open", "fcntl.flock", "os.rename", "os.remove"} <= set(steps)
    for step in range(1, len(steps) + 1):
        cache = cache_for(step)
        assert run("x", url, body, cache, extract, step)[0] == -signal.SIGKILL
        # Whoever looks in between sees the old file or the new one.
        if (cache / "datasets" / "x").exists():
            assert (cache / "datasets" / "x").read_bytes() in (body, b"another file")
        path = get_file("x", url, file_hash=hashlib.sha256(body).hexdigest(), extract=extract, cache_dir=cache)
        assert path == str(cache / "datasets" / "x")
        check(cache / "datasets", "x", body, extract)


def test_kill_in_the_middle_of_the_body(site: Site, tmp_path: Path) -> None:
    url = site.put("/x", BODY, stalls_after(700_000, seconds=5))
    child = start("x", url, BODY, tmp_path, False, 0)
    folder = tmp_path / "datasets"
    deadline_s = time.monotonic() + 30
    while not any(path.stat().st_size for path in folder.glob(".x.part-*")):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert not (folder / "x").exists()
    assert len(names_in(folder)) == 2  # the lock and the half
    assert len(site.seen) == 1
    get_file("x", url, file_hash=hashlib.sha256(BODY).hexdigest(), cache_dir=tmp_path)
    check(folder, "x", BODY, False)


@pytest.mark.parametrize("extract", [False, True])
def test_two_processes_share_one_download(site: Site, tmp_path: Path, extract: bool) -> None:
    body = packed() if extract else BODY
    url = site.put("/x", body, slow(1.0))
    children = [start("x", url, body, tmp_path, extract, 0) for _ in range(2)]
    for child in children:
        child.communicate(timeout=60)
    assert [child.returncode for child in children] == [0, 0]
    assert len(site.seen) == 1
    check(tmp_path / "datasets", "x", body, extract)


def test_who_waits_takes_over_when_the_first_is_killed(site: Site, tmp_path: Path) -> None:
    url = site.put("/x", BODY, stalls_after(700_000, seconds=5))
    first = start("x", url, BODY, tmp_path, False, 0)
    while not site.seen:
        time.sleep(0.01)
    second = start("x", url, BODY, tmp_path, False, 0)
    time.sleep(0.5)
    assert second.poll() is None
    assert len(site.seen) == 1
    first.kill()
    second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert second.returncode == 0
    assert len(site.seen) == 2
    check(tmp_path / "datasets", "x", BODY, False)
