"""A disk that refuses, at each step of staging: never a wrong file under a name, no hang, nothing left by the next run."""

from __future__ import annotations

import errno
import hashlib
import os

import pytest
from staging_disk import BEGINNINGS, published, refuse, watched
from staging_samples import left_in, make_set, stage_set, tree_of

from hpcutils.errors import DataError
from hpcutils.staging.stage import Item, stage


@pytest.mark.parametrize(
    "beginning, number", [("nothing there", errno.ENOSPC), ("a partial", errno.EIO), ("a changed dataset", errno.ENOSPC)]
)
def test_a_dataset(tmp_path, beginning, number):
    source, manifest = make_set(tmp_path)
    wanted = tree_of(source)

    def attempt(step: int) -> int:
        root = tmp_path / f"cache-{step}"
        BEGINNINGS[beginning](source, manifest, root)
        with watched(root, step, refuse(number)) as disk:
            try:
                stage_set(manifest, source, root)
            except DataError as exc:
                assert os.strerror(number) in exc.message
        if beginning != "a changed dataset":
            assert published(root) in ([], [wanted])
        assert tree_of(stage_set(manifest, source, root).files) == wanted
        assert published(root) == [wanted]
        assert left_in(root) == []
        return disk.count

    steps = attempt(0)
    assert steps >= 20
    assert all(attempt(step) for step in range(1, steps + 1))


@pytest.mark.parametrize("known", [True, False], ids=["with sha256", "without"])
def test_one_file(tmp_path, known):
    body = os.urandom(100_000)
    (tmp_path / "x").write_bytes(body)
    item = Item("x", str(tmp_path / "x"), hashlib.sha256(body).hexdigest() if known else None)

    def attempt(step: int) -> int:
        root = tmp_path / f"cache-{step}"
        with watched(root, step, refuse(errno.ENOSPC)) as disk:
            try:
                stage(item, root)
            except DataError as exc:
                assert "No space left" in exc.message
        assert published(root) in ([], [{"x": body}])
        assert stage(item, root).path.read_bytes() == body
        assert left_in(root) == []
        return disk.count

    steps = attempt(0)
    assert steps >= 12
    assert all(attempt(step) for step in range(1, steps + 1))
