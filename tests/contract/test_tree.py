"""What must never be in a tracked file."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_lock_files_name_no_address():
    locks = [path for path in tracked() if path.parent.name == "locks"]
    assert locks
    assert [
        path.name for path in locks if re.search(r"://|--index|--extra|--find-links", path.read_text()) and path.suffix == ".txt"
    ] == []


def test_no_large_files():
    assert [str(path) for path in tracked() if path.stat().st_size > 1 << 20] == []


def test_top_level_is_the_plan_of_the_house():
    names = {path.relative_to(ROOT).parts[0] for path in tracked()}
    plan = {"pyproject.toml", "README.md", "CHANGELOG.md", "Makefile", ".ci", ".gitignore"}
    assert names == plan | {"hpcutils", "jobs", "containers", "slurm", "tests", "docs", "benchmarks"}
