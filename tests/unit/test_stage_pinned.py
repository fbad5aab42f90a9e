"""A dataset that a running job uses, and that is not what it was when the next job comes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from staging_disk import published
from staging_samples import left_in, make_set, stage_set, tree_of

from hpcutils.staging import cache, store, swap
from hpcutils.staging.dataset import dataset_of_manifest
from hpcutils.staging.look import place_of
from hpcutils.staging.manifest import read_manifest
from hpcutils.staging.store import MARKER, Place


@pytest.fixture
def used(tmp_path):
    """A dataset and its place; a process that sleeps pins it."""
    source, manifest = make_set(tmp_path)
    stage_set(manifest, source, tmp_path / "cache")
    place = place_of(dataset_of_manifest(read_manifest(manifest)), tmp_path / "cache")
    cache.unpin(place)
    code = (
        "import sys; from pathlib import Path; from hpcutils.staging import cache, store\n"
        "cache.pin(store.Place(Path(sys.argv[1]), *sys.argv[2:])); print('pinned', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(place.root), place.kind, place.key]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "pinned\n"
        yield source, manifest, place
        job.communicate()


def missed(place: Place, stop: threading.Event) -> list[str]:
    """Look again and again, as the running job does; return what was not there at some moment."""
    found = []
    while not stop.is_set():
        try:
            (place.files / "large.h5").stat()
        except FileNotFoundError as exc:
            found.append(str(exc))
    return found


def staged_while_watched(source: Path, manifest: Path, place: Place, **settings) -> tuple[int, list[str]]:
    """Stage; return the bytes read from the source, and what the running job missed meanwhile."""
    stop, gone = threading.Event(), []
    thread = threading.Thread(target=lambda: gone.extend(missed(place, stop)))
    thread.start()
    try:
        outcome = stage_set(manifest, source, place.root, **settings)
    finally:
        stop.set()
        thread.join()
    assert tree_of(outcome.files) == tree_of(source)
    assert published(place.root) == [tree_of(source)]
    assert left_in(place.root) == []
    return outcome.origin_bytes, gone


def touch(place: Place) -> None:
    os.utime(place.files / "large.h5")


TIMES = {
    "a time": touch,
    "the marker is cut off": lambda place: os.truncate(place.entry / MARKER, 300),
    "the marker is empty": lambda place: os.truncate(place.entry / MARKER, 0),
}


@pytest.mark.parametrize("change", TIMES)
def test_bytes_that_are_right_stay_where_they_are(used, change):
    source, manifest, place = used
    inode = (place.files / "large.h5").stat().st_ino
    TIMES[change](place)
    assert staged_while_watched(source, manifest, place) == (0, [])
    assert (place.files / "large.h5").stat().st_ino == inode
    assert store.is_intact(place.entry)


BYTES = {
    "a file was written": lambda place: (place.files / "small" / "05.bin").write_bytes(b"\0" * (1 + 5 * 1997)),
    "a file is gone": lambda place: (place.files / "small" / "05.bin").unlink(),
    "a file too many": lambda place: (place.files / "small" / "more").write_bytes(b"x"),
}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "where names cannot be exchanged"])
@pytest.mark.parametrize("change", BYTES)
def test_what_is_wrong_is_replaced_at_once(used, monkeypatch, change, exchange):
    source, manifest, place = used
    with (place.files / "large.h5").open("rb") as stream:
        body = stream.read()
        BYTES[change](place)
        if not exchange:
            monkeypatch.setattr(swap, "_exchange", lambda *paths: False)
        moved, gone = staged_while_watched(source, manifest, place)
        assert moved > 0
        assert gone == [] or not exchange
        # What the job has open stays.
        stream.seek(0)
        assert stream.read() == body
    assert store.is_intact(place.entry)


def test_rot_that_verify_finds_is_replaced_too(used):
    source, manifest, place = used
    facts = (place.files / "large.h5").stat()
    with (place.files / "large.h5").open("r+b") as stream:
        stream.write(b"\0\0\0\0")
    os.utime(place.files / "large.h5", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    moved, gone = staged_while_watched(source, manifest, place, verify=True)
    assert (moved > 0, gone) == (True, [])
