"""The Debian lock: how it is made, what it lets apt install, and what happens when a mirror has moved on. apt is shell scripts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hpcutils.errors import ImageError
from hpcutils.image.apt import installed_versions, preferences
from hpcutils.image.debian import index_of, plan_debian_lock, run_debian_lock
from hpcutils.image.digest import debian_lock
from hpcutils.image.finished import renewed_before, renewed_lock
from hpcutils.image.layers import check_versions
from hpcutils.image.lock import renew
from hpcutils.image.machine import Machine, build_files, sources_text
from hpcutils.image.plan import BuildPlan, plan_build
from hpcutils.image.relock import fetched, with_usable_lock
from hpcutils.specs.debian import DebianLock, changes, parse_debian_lock
from hpcutils.specs.site import Build

ROOT = Path(__file__).parents[2]
NAME = "tf-horovod-cpu"
LOCK = parse_debian_lock((ROOT / f"containers/locks/{NAME}.debian.txt").read_text(), NAME)

# apt-get and apt-cache: the mirror is a file of `name version` lines, and all that is asked for by name gets installed.
APT = """#!/usr/bin/python3
import os, pathlib, sys
folder, words = pathlib.Path("FOLDER"), sys.argv[1:]
has = dict(line.split() for line in (folder / "mirror").read_text().splitlines() if len(line.split()) == 2)
if words[0] == "update":
    (folder / "asked").touch()
    sys.exit("Err http://mirror.example" if (folder / "down").exists() else 0)
elif words[0] == "madison":
    print("\\n".join(f"{name} | {has[name]} | http://mirror.example main" for name in words[1:] if name in has))
elif words[0] == "show":
    print("".join("Package: {}\\nVersion: {}\\n\\n".format(*word.split("=")) for word in words[1:]))
else:
    status = (pathlib.Path(os.environ["APT_CONFIG"]).parent / "status").read_text()
    asked = ["libc6" if word == "?essential" else word for word in words]
    there = [name for name in asked if name in has and f"Package: {name}\\n" not in status]
    print("\\n".join(f"Inst {name} ({has[name]} Debian:12/stable [amd64])" for name in there))
"""


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose mirror has exactly what is locked; its file can be edited."""
    (tmp_path / "bin").mkdir()
    apt = APT.replace("FOLDER", str(tmp_path))
    for name, script in {"apt-get": apt, "apt-cache": apt, "dpkg": "#!/bin/sh\necho amd64\n"}.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    for name, value in {"HPCUTILS_CACHE": "cache", "HPCUTILS_IMAGES": "cache/images", "TMPDIR": "tmp"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "etc/apt").mkdir(parents=True)
    (tmp_path / "etc/apt/sources.list").write_text("deb https://mirror.example/debian bookworm main\n")
    (tmp_path / "mirror").write_text("".join(f"{name} {version}\n" for name, version in LOCK.versions().items()))
    return tmp_path / "mirror"


def here(mirror: Path) -> Machine:
    return Machine({"TMPDIR": str(mirror.parent / "tmp")}, mirror.parent, mirror.parent / "etc")


def moved_on(mirror: Path, name: str, version: str) -> None:
    """The mirror has another version of a package now, and the old one no longer."""
    mirror.write_text(mirror.read_text().replace(f"\n{name} {LOCK.versions()[name]}\n", f"\n{name} {version}\n"))


# What apt is told.


def test_preferences_of_a_build_allow_nothing_that_is_not_locked() -> None:
    text = preferences({"b": "1:2-3+deb12u1", "a": "1"}, only=True)
    assert text.split("\n\n") == [
        "Package: *\nPin: release *\nPin-Priority: -1",
        "Package: a\nPin: version 1\nPin-Priority: 1001",
        "Package: b\nPin: version 1:2-3+deb12u1\nPin-Priority: 1001\n",
    ]
    assert "Package: *" not in preferences({"a": "1"}, only=False)


def test_what_is_installed_is_read_from_dpkgs_status() -> None:
    there, gone = (
        "Package: a\nStatus: install ok installed\nVersion: 1\n",
        "Package: b\nStatus: deinstall ok config-files\nVersion: 2\n",
    )
    assert installed_versions(f"{there}\n{gone}\n") == {"a": "1"}


def test_apt_reads_nothing_of_the_machine_but_how_mirrors_are_reached(mirror: Path) -> None:
    with index_of(here(mirror), "bookworm") as index:
        conf = Path(index.environment["APT_CONFIG"])
        assert conf.stat().st_mode & 0o077 == 0
        text = conf.read_text()
        assert 'Dir::Etc::Parts "/dev/null";' in text and f'Dir::State::status "{index.folder}/status";' in text
    assert list((mirror.parent / "tmp").iterdir()) == []


def test_a_snapshot_of_the_sites_stands_for_the_machines_mirrors(tmp_path: Path) -> None:
    lines = ("deb http://snapshot.example/debian bookworm main", "deb http://snapshot.example/security bookworm-security main")
    machine = Machine({}, tmp_path, tmp_path, Build(apt_sources=lines))
    assert sources_text(machine, "bookworm") == "".join(f"{line}\n" for line in lines)
    files = build_files(machine, "bookworm").texts
    # Its lists are past their date.
    assert files["sources.list"].count("snapshot.example") == 2 and 'Acquire::Check-Valid-Until "false";' in files["apt.conf"]


def test_a_mirror_that_does_not_answer_is_told_without_its_address(mirror: Path) -> None:
    (mirror.parent / "down").touch()
    with pytest.raises(ImageError, match="could not be fetched:\nErr <address>"), index_of(here(mirror), "bookworm"):
        pass


# Making a lock.


def containers(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "containers", mirror.parent / "containers")
    monkeypatch.setenv("HPCUTILS_CONTAINERS", str(mirror.parent / "containers"))
    return mirror.parent / "containers"


def test_a_lock_has_what_apt_installs_in_each_stage_and_nothing_twice(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = containers(mirror, monkeypatch) / f"locks/{NAME}.debian.txt"
    lock.unlink()
    step = plan_debian_lock(NAME)
    assert step is not None and step.lock == lock
    run_debian_lock(step, here(mirror), upgrade=False)
    made = parse_debian_lock(lock.read_text(), "lock")
    assert set(made.base) == {"libc6", "apt", "ca-certificates", "python3", "python3-venv"}
    assert set(made.image) == {"graphviz", "libhdf5-openmpi-103-1", "libhdf5-openmpi-hl-100", "openmpi-bin"}
    assert "g++" in made.compile and made.compile["g++"] == LOCK.compile["g++"]
    assert "://" not in lock.read_text() and lock.read_text().startswith("# Made by 'hpcutils image lock': Debian bookworm, amd64.")
    assert run_debian_lock(step, here(mirror), upgrade=False) == ()


def test_renewing_changes_what_is_gone(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = containers(mirror, monkeypatch) / f"locks/{NAME}.debian.txt"
    lock.write_text(f"[base]\n{''.join(f'{n}={LOCK.base[n]}' + chr(10) for n in ('apt', 'libc6'))}")
    moved_on(mirror, "libc6", "2.99-1")
    step = plan_debian_lock(NAME)
    assert step is not None
    said = run_debian_lock(step, here(mirror), upgrade=False)
    assert f"libc6 {LOCK.base['libc6']} → 2.99-1" in said and not any(line.startswith("apt ") for line in said)


def test_a_recipe_that_adds_to_another_locks_only_what_it_adds(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    containers(mirror, monkeypatch)
    mirror.write_text(f"{mirror.read_text()}git 1:2.39.5\n")
    mine = mirror.parent / "mine.toml"
    mine.write_text(
        f'name = "mine"\nsummary = "s"\nextends = "{NAME}"\n[system]\npackages = ["git"]\nextra_locks = ["mine.debian.txt"]\n'
    )
    (renewed,) = renew(str(mine), here(mirror), upgrade=False)
    assert renewed.changes == ("git none → 1:2.39.5",)
    assert parse_debian_lock((mirror.parent / "mine.debian.txt").read_text(), "mine") == DebianLock(image={"git": "1:2.39.5"})
    assert plan_build(str(mine)).files.recipe.system.packages[-1] == "git"


# A mirror that has moved on.


def usable(mirror: Path, *, relock: bool) -> BuildPlan:
    return with_usable_lock(plan_build(NAME), here(mirror), relock=relock)


def test_a_lock_that_can_be_had_is_used_as_it_is(mirror: Path) -> None:
    for relock in (False, True):
        plan = usable(mirror, relock=relock)
        assert (plan.digest, plan.relocked) == (plan_build(NAME).digest, ())
    assert not (mirror.parent / "cache/locks").exists()


def test_a_build_of_what_is_gone_is_refused_with_each_package(mirror: Path) -> None:
    moved_on(mirror, "libc6", "2.99-1")
    moved_on(mirror, "g++", "")
    with pytest.raises(ImageError) as caught:
        usable(mirror, relock=False)
    assert caught.value.message.splitlines() == [
        f"{NAME}: this machine's Debian mirrors no longer have what is locked:",
        f"  g++: locked {LOCK.compile['g++']}, available none",
        f"  libc6: locked {LOCK.base['libc6']}, available 2.99-1",
    ]
    for words in (f"hpcutils image lock {NAME}", f"hpcutils build {NAME} --relock", "build.apt_sources"):
        assert words in (caught.value.hint or "")


def test_relocking_builds_what_there_is_and_says_so(mirror: Path, caplog: pytest.LogCaptureFixture) -> None:
    moved_on(mirror, "libc6", "2.99-1")
    asked = plan_build(NAME)
    plan = usable(mirror, relock=True)
    assert plan.digest != asked.digest and plan.image != asked.image and plan.base != asked.base and plan.link == asked.link
    assert debian_lock(plan.files).base["libc6"] == "2.99-1"
    assert f"libc6 {LOCK.base['libc6']} → 2.99-1" in plan.relocked
    assert "THE DEBIAN LOCK CANNOT BE HAD ANY MORE" in caplog.text and f"  libc6 {LOCK.base['libc6']} → 2.99-1" in caplog.text
    # The recipe's own lock is as it was; the next build of this machine takes the one that was renewed.
    assert plan_build(NAME).digest == asked.digest and renewed_lock(asked).is_file()
    earlier = renewed_before(asked)
    assert earlier is not None and earlier.digest == plan.digest == usable(mirror, relock=True).digest
    # And when that is gone as well, a newer one.
    mirror.write_text(mirror.read_text().replace("libc6 2.99-1", "libc6 2.99-2"))
    assert debian_lock(usable(mirror, relock=True).files).base["libc6"] == "2.99-2"


def test_layers_that_are_there_need_no_mirror(mirror: Path) -> None:
    (mirror.parent / "down").touch()
    plan = plan_build(NAME)
    assert fetched(plan) == LOCK.versions()
    plan.wheels.mkdir(parents=True)
    assert fetched(plan) == {**LOCK.base, **LOCK.image}
    plan.base.parent.mkdir(parents=True)
    plan.base.touch()
    assert fetched(plan) == LOCK.image
    plan.environment.parent.mkdir(parents=True)
    plan.environment.touch()
    assert fetched(plan) == {} and usable(mirror, relock=False) == plan
    assert not (mirror.parent / "asked").exists()


def test_what_was_built_is_held_against_the_lock() -> None:
    check_versions("the image", {"a": "1"}, {"a": "1", "b": "2"})
    with pytest.raises(ImageError, match="the base has other Debian packages than the lock:\n  b: none, the lock says 2"):
        check_versions("the base", {"a": "1"}, {"a": "1", "b": "2"}, exactly=True)
    with pytest.raises(ImageError, match="  a: 2, the lock says 1\n  c: 1, the lock says none"):
        check_versions("the image", {"a": "2", "c": "1"}, {"a": "1"})


def test_changes_between_locks() -> None:
    before, after = DebianLock(base={"a": "1", "b": "1"}), DebianLock(base={"a": "1", "b": "2"}, image={"c": "3"})
    assert changes(before, after) == ("b 1 → 2", "c none → 3") and changes(after, after) == ()
