"""What the README shows is what a newcomer gets: its train.yaml is one, and its messages are those of the program."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpcutils.specs.job import load_job

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MISTAKES = [("epochs: ", "epoch: "), ("gpus: 8", "gpus: 7"), ('"00:10:00"', "1h")]


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """The README's train.yaml, beside the code of jobs/digits."""
    for path in (ROOT / "jobs" / "digits").glob("*.py"):
        shutil.copy(path, tmp_path)
    found = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert found is not None
    (tmp_path / "train.yaml").write_text(found[1])
    return tmp_path / "train.yaml"


def test_its_train_yaml_is_the_example_in_fifteen_lines(job_file):
    assert len(job_file.read_text().splitlines()) == 15
    shown, example = load_job(job_file), load_job(ROOT / "jobs" / "digits" / "train.yaml")
    assert shown.model_copy(update={"training": example.training}) == example
    assert shown.training.model_copy(update={"seed": example.training.seed}) == example.training


def test_its_messages_are_those_of_a_train_yaml_with_these_mistakes(job_file):
    text = job_file.read_text()
    for right, wrong in MISTAKES:
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    job_file.write_text(text)
    words = [sys.executable, "-m", "hpcutils", "submit", "train.yaml"]
    done = subprocess.run(words, cwd=job_file.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    shown = re.search(r"((?:    .*\n)+)\n## What comes out", README)
    assert shown is not None
    assert done.stderr.splitlines() == [line[4:] for line in shown[1].splitlines()]
