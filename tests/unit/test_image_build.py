"""What a build leaves behind, however it ended: the image is a few bytes here, and what makes it a function."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpcutils import fs
from hpcutils.image import build, layers
from hpcutils.image.build import Place, _publish_image
from hpcutils.image.builders import Finding
from hpcutils.image.find import sbom_of, sidecar_of
from hpcutils.image.layers import Workbench, keep_wheels
from hpcutils.image.machine import Machine
from hpcutils.image.plan import BuildPlan, plan_build
from hpcutils.image.selftest import Report
from hpcutils.image.workspace import ending_on_signals, sweep


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildPlan:
    monkeypatch.setenv("HPCUTILS_CACHE", str(tmp_path))
    monkeypatch.delenv("HPCUTILS_IMAGES", raising=False)
    return plan_build("tf-horovod-cpu")


def publish_one(plan: BuildPlan, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """Publish an image of this content."""
    report = Report(checks=({"check": "a", "ok": True, "seconds": 0, "seen": ""},))
    monkeypatch.setattr(build, "_make_sif", lambda plan, target, place: target.write_text(content) and report)
    monkeypatch.setattr(build, "versions", lambda *words: {})
    bench = Workbench("apptainer", plan.image.parent, Machine({}, Path("/nowhere")))
    place = Place(bench, Finding("apptainer", "apptainer", "a", "1", True, ""), "")
    _publish_image(plan, "code", place, {}, time.monotonic())


def files(plan: BuildPlan) -> dict[str, str]:
    found = [path for path in plan.image.parent.iterdir() if path.is_file() and not path.is_symlink()]
    return {path.name: path.read_text() for path in found}


def test_a_rebuild_that_is_ended_before_its_image_came_leaves_the_old_one_with_its_own_sidecar(plan, monkeypatch) -> None:
    publish_one(plan, monkeypatch, "old")
    before = files(plan)
    assert json.loads(before[sidecar_of(plan.image).name])["size_bytes"] == 3
    original = fs.publish

    def interrupted(temporary: Path, target: Path) -> None:
        if target == plan.image:
            raise SystemExit(143)
        original(temporary, target)

    monkeypatch.setattr(fs, "publish", interrupted)
    with pytest.raises(SystemExit):
        publish_one(plan, monkeypatch, "newer")
    assert files(plan) == before


def test_a_rebuild_that_is_ended_after_its_image_came_keeps_the_new_sidecar(plan, monkeypatch) -> None:
    publish_one(plan, monkeypatch, "old")
    original = fs.publish

    def interrupted(temporary: Path, target: Path) -> None:
        original(temporary, target)
        if target == plan.image:
            raise SystemExit(143)

    monkeypatch.setattr(fs, "publish", interrupted)
    with pytest.raises(SystemExit):
        publish_one(plan, monkeypatch, "newer")
    assert plan.image.read_text() == "newer"
    assert json.loads(sidecar_of(plan.image).read_text())["size_bytes"] == 5


def test_a_first_build_that_is_ended_leaves_nothing(plan, monkeypatch) -> None:
    original = fs.publish

    def interrupted(temporary: Path, target: Path) -> None:
        if target == sidecar_of(plan.image):
            raise KeyboardInterrupt
        original(temporary, target)

    monkeypatch.setattr(fs, "publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish_one(plan, monkeypatch, "new")
    assert files(plan) == {} and not sbom_of(plan.image).exists()


def test_the_image_is_on_its_disk_before_its_sidecar_is_seen(plan, monkeypatch) -> None:
    """Flushing half a gigabyte takes seconds: none of them may pass between the two names."""
    order: list[str] = []
    flush, publish = fs.fsync_path, fs.publish
    monkeypatch.setattr(build, "fsync_path", lambda path: order.append(f"flush {path.suffix}") or flush(path))
    monkeypatch.setattr(fs, "publish", lambda part, target: order.append(f"name {target.suffix}") or publish(part, target))
    publish_one(plan, monkeypatch, "new")
    assert order[:4] == ["flush .sif", "name .json", "name .json", "name .sif"]


def dead() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_killed_builds_left_goes_and_nothing_else(plan: BuildPlan) -> None:
    host, name = os.uname().nodename, plan.image.name
    folder = plan.image.parent
    folder.mkdir(parents=True, exist_ok=True)
    plan.wheels.parent.mkdir(parents=True)
    gone = [
        folder / f".{name}.part-{host}-{dead()}-0123abcd.sif",
        folder / f".tf-horovod-cpu-{'0' * 12}.json.part-{host}-{dead()}-0123abcd",
        folder / f".tf-horovod-cpu.sif.part-{host}-{dead()}-0123abcd",
    ]
    stays = [
        folder / f".{name}.part-{host}-{os.getpid()}-0123abcd.sif",
        folder / f".{name}.part-another-host-{dead()}-0123abcd.sif",
        # Another recipe's: its own build has the lock for it.
        folder / f".tf-horovod-cuda-{'0' * 12}.sif.part-{host}-{dead()}-0123abcd.sif",
        folder / name,
    ]
    for path in (*gone, *stays):
        path.write_text("x")
    wheels = plan.wheels.with_name(f".{plan.wheels.name}.part-{host}-{dead()}-0123abcd")
    wheels.mkdir()
    (wheels / "a.whl").write_text("x")
    sweep(plan)
    assert not [path for path in (*gone, wheels) if path.exists()]
    assert [path for path in stays if not path.exists()] == []


def test_of_two_recipes_with_equal_wheels_the_second_leaves_the_first_ones(tmp_path: Path, monkeypatch) -> None:
    made, wheels = tmp_path / "made", tmp_path / "wheels/abc"
    made.mkdir()
    for name in (".complete", "a.whl"):
        (made / name).write_text("second")

    def copy_while_another_finishes(source: Path, target: Path) -> None:
        target.mkdir()
        wheels.mkdir(parents=True)
        (wheels / "a.whl").write_text("first")

    monkeypatch.setattr(layers.shutil, "copytree", copy_while_another_finishes)
    keep_wheels(made, wheels)
    assert (wheels / "a.whl").read_text() == "first"
    assert [path.name for path in wheels.parent.iterdir()] == ["abc"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_build_by_an_exception(number: signal.Signals) -> None:
    def wait() -> Any:
        with ending_on_signals():
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(SystemExit) as caught:
        wait()
    assert caught.value.code == 128 + number


def test_a_build_under_nohup_goes_on_when_its_terminal_is_gone() -> None:
    code = (
        "import os, signal\nfrom hpcutils.image.workspace import ending_on_signals\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with ending_on_signals():\n    os.kill(os.getpid(), signal.SIGHUP)\nprint('done')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "done\n"


def test_a_build_with_nothing_to_do_imports_nothing_that_builds(plan: BuildPlan) -> None:
    """It is to be over in a fraction of a second, most of which is importing."""
    plan.image.parent.mkdir(parents=True, exist_ok=True)
    plan.image.write_bytes(b"sif")
    sidecar_of(plan.image).write_text(json.dumps({"digest": plan.digest, "size_bytes": 3, "sha256": "f" * 64}))
    code = (
        "import sys\nfrom hpcutils.cli import cli\ncli(['build', 'tf-horovod-cpu'], standalone_mode=False)\n"
        "print([name for name in sys.modules if name in ('tarfile', 'configparser', 'hpcutils.image.build')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(plan.image), "[]"] and "up to date" in done.stderr
    assert plan.link.resolve() == plan.image
