"""kill -9 at each step of staging: the next run is right, takes up what proves right, and leaves nothing behind.

Each step is a test of its own. How many there are depends a little on the threads that write: a step beyond the last one does not
come, and the process must end well then.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

# The samples are shared with the unit tests, which are not a package.
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from servers import serving
from staging_disk import BEGINNINGS, PINNED, die, published, watched
from staging_samples import left_in, make_set, stage_set, tree_of

from hpcutils.staging.items import Item, Settings
from hpcutils.staging.leaders import Leaders
from hpcutils.staging.stage import stage
from hpcutils.staging.unpacked import unpack_archive

# The fewest steps that there may be, and more than there are.
DATASETS = {
    "nothing there": (60, 86),
    "a partial": (30, 52),
    "a changed dataset": (35, 60),
    "a changed dataset that a job uses": (60, 90),
}
ONE_FILE, WEB, UNPACKING = (12, 34), (12, 34), (40, 64)


def in_child(root: Path, step: int, call: Callable[[], object]) -> int:
    """Do `call` in a process that dies at a step; return the steps that it counted, 0 when it died."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with watched(root, step, die, removals=True) as disk:
                call()
            os.write(writing, str(disk.count).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001 - nothing of the test may go on in the child
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert (os.WTERMSIG(status), step > 0) == (signal.SIGKILL, True)
        return 0
    assert os.WEXITSTATUS(status) == 0
    # It ended by itself: there was no such step.
    assert step == 0 or step > int(said)
    return int(said)


def steps_of(cases: dict[str, tuple[int, int]]) -> list[object]:
    return [
        pytest.param(beginning, step, id=f"{beginning}, step {step}")
        for beginning, (_, last) in cases.items()
        for step in range(1, last + 1)
    ]


def attempt(folder: Path, beginning: str, step: int) -> int:
    source, manifest = make_set(folder)
    wanted, root = tree_of(source), folder / "cache"
    (BEGINNINGS | PINNED)[beginning](source, manifest, root)
    count = in_child(root, step, lambda: stage_set(manifest, source, root))
    if not beginning.startswith("a changed dataset"):
        assert published(root) in ([], [wanted])
    assert tree_of(stage_set(manifest, source, root).files) == wanted
    assert published(root) == [wanted]
    assert left_in(root) == []
    return count


@pytest.mark.parametrize("beginning, step", steps_of(DATASETS))
def test_a_dataset(tmp_path, beginning, step):
    attempt(tmp_path, beginning, step)


@pytest.mark.parametrize("beginning", DATASETS)
def test_all_steps_of_a_dataset_are_tried(tmp_path, beginning):
    fewest, last = DATASETS[beginning]
    assert fewest <= attempt(tmp_path, beginning, 0) <= last


def attempt_file(folder: Path, origin: str, body: bytes, step: int) -> int:
    item, root = Item("x", origin, hashlib.sha256(body).hexdigest()), folder / "cache"
    count = in_child(root, step, lambda: stage(item, root))
    assert published(root) in ([], [{"x": body}])
    assert stage(item, root).path.read_bytes() == body
    assert left_in(root) == []
    return count


@pytest.mark.parametrize("step", range(1, ONE_FILE[1] + 1))
def test_one_file(tmp_path, step):
    (tmp_path / "x").write_bytes(body := os.urandom(100_000))
    attempt_file(tmp_path, str(tmp_path / "x"), body, step)


@pytest.mark.parametrize("step", range(1, WEB[1] + 1))
def test_a_file_of_a_web_server(tmp_path, step):
    body = os.urandom(100_000)
    with serving() as site:
        attempt_file(tmp_path, site.put("/x", body), body, step)


def attempt_unpacking(folder: Path, step: int) -> int:
    source, _ = make_set(folder)
    wanted, root = tree_of(source), folder / "cache"
    with tarfile.open(folder / "set.tar.gz", "w:gz") as archive:
        archive.add(source, ".")
    digest = hashlib.sha256((folder / "set.tar.gz").read_bytes()).hexdigest()

    def unpack() -> Path:
        return unpack_archive(folder / "set.tar.gz", digest, "large.h5", Settings(root), Leaders())

    count = in_child(root, step, unpack)
    assert published(root) in ([], [wanted])
    assert tree_of(unpack().parent) == wanted
    assert published(root) == [wanted]
    assert left_in(root) == []
    return count


@pytest.mark.parametrize("step", range(1, UNPACKING[1] + 1))
def test_unpacking(tmp_path, step):
    attempt_unpacking(tmp_path, step)


def test_all_steps_of_the_others_are_tried(tmp_path):
    (tmp_path / "x").write_bytes(body := os.urandom(100_000))
    for name in "abc":
        (tmp_path / name).mkdir()
    with serving() as site:
        url = site.put("/x", body)
        counts = {
            "a file": (attempt_file(tmp_path / "a", str(tmp_path / "x"), body, 0), ONE_FILE),
            "the web": (attempt_file(tmp_path / "b", url, body, 0), WEB),
        }
        counts["unpacking"] = (attempt_unpacking(tmp_path / "c", 0), UNPACKING)
    assert {name: count for name, (count, (fewest, last)) in counts.items() if not fewest <= count <= last} == {}
