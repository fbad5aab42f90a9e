"""`multi_gpu_model`, `replicate` and `placement`.

What needs several devices runs in `replication_checks.py`, once with 2 and once with 4 logical CPU devices.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import replication_checks

from hpcutils.errors import DeviceError
from hpcutils.models.replication import choose

SCRIPT = Path(replication_checks.__file__)
ALL_CHECKS = [(count, name) for count, checks in replication_checks.CHECKS.items() for name in checks]
REPORTS: dict[int, dict[str, str]] = {}


def report(count: int) -> dict[str, str]:
    """Run all checks for `count` devices, once a test session."""
    if count not in REPORTS:
        done = subprocess.run([sys.executable, SCRIPT, str(count)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        REPORTS[count] = json.loads(done.stdout)
    return REPORTS[count]


@pytest.mark.parametrize(("count", "name"), ALL_CHECKS, ids=[f"{count}-{name}" for count, name in ALL_CHECKS])
def test_on_logical_devices(count: int, name: str) -> None:
    outcome = report(count)[name]
    assert outcome == "ok", outcome


GPUS = ["/device:GPU:0", "/device:GPU:1", "/device:GPU:2"]


@pytest.mark.parametrize(
    ("gpus", "chosen"),
    [(None, GPUS), (2, GPUS[:2]), (3, GPUS), ([2, 0], [GPUS[2], GPUS[0]]), ((0, 1), GPUS[:2]), (range(1, 3), GPUS[1:])],
)
def test_counts_and_ids_choose_devices(gpus: object, chosen: list[str]) -> None:
    assert choose(gpus, GPUS) == chosen  # type: ignore[arg-type]


@pytest.mark.parametrize("gpus", [0, 1, 4, -2, [], [1], [0, 3], [0, -1], True, "2", 2.0, [0, "1"]])
def test_impossible_devices_are_refused(gpus: object) -> None:
    with pytest.raises(DeviceError) as caught:
        choose(gpus, GPUS)  # type: ignore[arg-type]
    assert f"gpus={gpus!r}" in str(caught.value)


@pytest.mark.parametrize("gpus", [None, 2, [0, 1]])
def test_a_machine_without_devices_says_how_to_simulate_them(gpus: object) -> None:
    with pytest.raises(DeviceError, match="no GPU, and one CPU") as caught:
        choose(gpus, [])  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)
    assert "set_logical_device_configuration" in str(caught.value)


def test_the_module_imports_no_tensorflow() -> None:
    code = "import sys, hpcutils.models.replication as r; sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
