"""The demo's last line: `ok` for the run that was asked for and no other, `failed` whatever went wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GOOD = {
    "run": "digits-1", "nodes": 2, "world_size": 2, "replicas": 8, "accuracy": 0.9778, "coverage": "exact",
    "weights_identical": True,
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose sandbox runs commands here, and whose hpcutils says that the run in RUN is over."""
    for folder in (".ci", "slurm", "bin", "home", "run", ".venv/bin", "jobs/digits"):
        (tmp_path / folder).mkdir(parents=True)
    for name in (".ci/demo", ".ci/demo-line", "jobs/digits/model.py", "jobs/digits/train.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    scripts = {
        "bin/getent": f"echo hpcuser:x:1:1::{tmp_path}/home:/bin/sh",
        "bin/hpcutils": f"""echo '{{"path": "{tmp_path}/run"}}'""",
        "slurm/sandbox": f'echo "sandbox $1" >&2\n[ "$1" = "${{FAILING:-}}" ] && exit 4\n[ "$1" = exec ] || exit 0\n'
        f'while [ "$1" != -- ]; do shift; done; shift\nPATH={tmp_path}/bin:$PATH "$@"',
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run(argv: list, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, **options, capture_output=True, text=True, check=False)


def demo(checkout: Path, result: object, **environ: str) -> tuple[int, str, list[str]]:
    """Run the demo; return its exit code, its last line, and what the sandbox was asked."""
    if result is not None:
        (checkout / "run" / "result.json").write_text(json.dumps(result))
    path = f"{checkout}/bin{os.pathsep}{os.environ['PATH']}"
    done = run([checkout / ".ci" / "demo"], env={**os.environ, "PATH": path, "KEEP": "", **environ})
    asked = [line for line in done.stderr.splitlines() if line.startswith("sandbox")]
    return done.returncode, done.stdout.splitlines()[-1], asked


def test_a_good_run(checkout):
    code, line, asked = demo(checkout, GOOD)
    assert (code, asked[0], asked[-1]) == (0, "sandbox up", "sandbox down")
    assert line == "demo: ok run=digits-1 nodes=2 world_size=2 replicas=8 accuracy=0.9778 coverage=exact"


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": 1}, {"world_size": 1}, {"replicas": 2}, {"accuracy": 0.9599}, {"accuracy": None}, {"accuracy": float("nan")},
        {"coverage": "partial"}, {"weights_identical": False},
    ],
)  # fmt: skip
def test_another_run_than_was_asked_for(checkout, change):
    code, line, asked = demo(checkout, GOOD | change)
    assert (code, asked[-1]) == (1, "sandbox down")
    assert line.startswith("demo: failed run=run: ")
    assert f"{next(iter(change))}=" in line
    assert "expected" in line


@pytest.mark.parametrize("failing, code", [("up", 4), ("exec", 4), ("down", 1)])
def test_a_sandbox_that_fails(checkout, failing, code):
    assert demo(checkout, GOOD, FAILING=failing)[:2] == (code, f"demo: failed with exit code {code}; the reason is above")


def test_a_run_without_a_result(checkout):
    code, line, _ = demo(checkout, None)
    assert (code, line) == (1, "demo: failed with exit code 1; the reason is above")


def test_the_cluster_stays_when_asked_to(checkout):
    code, line, asked = demo(checkout, GOOD, KEEP="1")
    assert (code, line[:8]) == (0, "demo: ok")
    assert "sandbox down" not in asked


def test_the_data_of_the_example_appear_whole(tmp_path):
    """Its script writes under another name first, and leaves nothing else."""
    done = subprocess.run(
        [sys.executable, ROOT / "jobs/digits/make_data.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["digits.h5"]
    digest = hashlib.sha256((tmp_path / "digits.h5").read_bytes()).hexdigest()
    assert digest in (ROOT / "jobs/digits/train.yaml").read_text()
    # A folder of that name: the rename fails, and the unfinished file goes.
    (tmp_path / "digits.h5").unlink()
    (tmp_path / "digits.h5").mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / "jobs/digits/make_data.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["digits.h5"]
