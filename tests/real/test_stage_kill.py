"""kill -9 at each step of staging: the next run is right, takes up what proves right, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# The samples are shared with the unit tests, which are not a package.
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from staging_disk import BEGINNINGS, die, published, watched
from staging_samples import left_in, make_set, stage_set, tree_of

from hpcutils.staging.stage import Item, stage


def in_child(root: Path, step: int, call: Callable[[], object]) -> tuple[int, int]:
    """Do `call` in a process that dies at a step; return the signal that ended it and the steps that it counted."""
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
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), int(said or 0)


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_dataset(tmp_path, beginning):
    source, manifest = make_set(tmp_path)
    wanted = tree_of(source)

    def attempt(step: int) -> int:
        root = tmp_path / f"cache-{step}"
        BEGINNINGS[beginning](source, manifest, root)
        ended_by, steps = in_child(root, step, lambda: stage_set(manifest, source, root))
        assert ended_by == (signal.SIGKILL if step else 0)
        if beginning != "a changed dataset":
            assert published(root) in ([], [wanted])
        outcome = stage_set(manifest, source, root)
        assert tree_of(outcome.files) == wanted
        assert published(root) == [wanted]
        assert left_in(root) == []
        return steps

    steps = attempt(0)
    assert steps >= 25
    for step in range(1, steps + 1):
        attempt(step)


def test_one_file(tmp_path):
    body = os.urandom(100_000)
    (tmp_path / "x").write_bytes(body)
    item = Item("x", str(tmp_path / "x"), hashlib.sha256(body).hexdigest())

    def attempt(step: int) -> int:
        root = tmp_path / f"cache-{step}"
        ended_by, steps = in_child(root, step, lambda: stage(item, root))
        assert ended_by == (signal.SIGKILL if step else 0)
        assert published(root) in ([], [{"x": body}])
        assert stage(item, root).path.read_bytes() == body
        assert left_in(root) == []
        return steps

    steps = attempt(0)
    assert steps >= 12
    for step in range(1, steps + 1):
        attempt(step)
