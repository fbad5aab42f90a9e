"""Whatever a train.yaml says: a job that job.json can hold, or one error with a place for each line."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpcutils.errors import SpecError
from hpcutils.specs.job import load_job, read_job

GOOD = (Path(__file__).parents[2] / "jobs" / "digits" / "train.yaml").read_text()
LINES = GOOD.splitlines(keepends=True)
VALUES = ["", "7", "-1", "[1, 2]", "{a: 1}", "text", "1.5", ".inf", "!x 1", "*a", "&a [*a]", "2024-01-01", "~", "? [1]"]
VALUES += ["'\\0'", '"\\uD800"']


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "model.py").write_text("")
        (Path(name) / "make_data.py").write_text("")
        yield Path(name)


def check(folder: Path, text: str) -> None:
    (folder / "train.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        job = load_job(folder / "train.yaml")
    except SpecError as exc:
        assert exc.hint
        lines = exc.message.splitlines()
        assert all(re.match(r"train\.yaml:\d+:\d+: .", line) for line in lines) or "cannot be read" in lines[0], exc.message
    else:
        assert read_job(job.model_dump_json()) == job


@settings(max_examples=150)
@given(st.text(max_size=60))
@example("\x00")
@example("%TAG ! tag:x\n---\na: !b c")
def test_any_text(folder, text):
    check(folder, text)


@settings(max_examples=150)
@given(st.integers(0, len(GOOD)), st.integers(0, 12), st.text(max_size=8))
def test_an_example_with_a_part_changed(folder, start, removed, text):
    check(folder, GOOD[:start] + text + GOOD[start + removed :])


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, len(LINES) - 1), st.sampled_from(VALUES)), min_size=1, max_size=3))
def test_an_example_with_other_values(folder, changes):
    lines = list(LINES)
    for number, value in changes:
        lines[number] = re.sub(r":( .*)?\n$", f": {value}\n".replace("\\", r"\\"), lines[number])
    check(folder, "".join(lines))
