"""The real image, built by the real Apptainer as an ordinary user: what is in it, and how builds behave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SANDBOX, USER, own, require

from hpcutils.errors import ImageError
from hpcutils.hashing import digest_file
from hpcutils.image.build import check_builder_rights
from hpcutils.image.exec_line import bind, exec_argv
from hpcutils.image.find import find_builder
from hpcutils.image.render import PYTHON
from hpcutils.image.sif import parse_listing
from hpcutils.specs.debian import DebianLock, parse_debian_lock
from hpcutils.specs.recipe_file import locked

pytestmark = pytest.mark.apptainer

NAME = "tf-horovod-cpu"
CONTAINERS = ROOT / "containers"


def as_user(*words: str, cwd: Path | None = None, check: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command as the ordinary user, outside of any cluster."""
    where = [] if cwd is None else ["--cwd", str(cwd)]
    variables = [f"{key}={value}" for key, value in environ.items()]
    argv = [str(SANDBOX), "user", *where, "--", "env", *variables, *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """The standard image of the code as it is now."""
    require(os.geteuid() == 0, "root, to become an ordinary user")
    find_builder()
    return json.loads(as_user("hpcutils", "build", NAME, "--json").stdout)


@pytest.fixture(scope="module")
def sidecar(built: dict[str, Any]) -> dict[str, Any]:
    return json.loads(Path(built["path"]).with_suffix(".json").read_text())


@contextlib.contextmanager
def users_folder(name: str) -> Iterator[Path]:
    folder = Path(pwd.getpwnam(USER).pw_dir) / f"{name}-{os.getpid()}"
    folder.mkdir()
    own(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def home() -> Iterator[Path]:
    """An empty folder of the ordinary user's."""
    with users_folder("image-tests") as folder:
        yield folder


@pytest.fixture(scope="module")
def frozen(built: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """An image of a copy of the code that nobody changes meanwhile, and the variables that make the copy the running one."""
    with users_folder("frozen-code") as folder:
        variables = changed_code(folder, "frozen")
        yield json.loads(as_user("hpcutils", "build", NAME, "--json", **variables).stdout), variables


def inside(built: dict[str, Any], *words: str, binds: tuple[str, ...] = (), cwd: str = "/", **environ: str) -> str:
    """Run a command in the image and return what it printed."""
    env = {"OMPI_MCA_mpi_yield_when_idle": "1", "TF_CPP_MIN_LOG_LEVEL": "3", **environ}
    return as_user(*exec_argv(built["path"], binds, env, cwd=cwd, program=find_builder()), *words).stdout


def changed_code(home: Path, mark: str) -> dict[str, str]:
    """Give the user a copy of the package that says `mark`; return the variables that make it the running one."""
    if not (home / "code").exists():
        shutil.copytree(ROOT / "hpcutils", home / "code/hpcutils", ignore=shutil.ignore_patterns("__pycache__"))
    (home / "code/hpcutils/mark.py").write_text(f"MARK = {mark!r}\n")
    own(home)
    return {"PYTHONPATH": str(home / "code"), "HPCUTILS_CONTAINERS": str(CONTAINERS), "HPCUTILS_IMAGES": str(home / "images")}


# What is in it.


def test_the_sidecar_describes_the_file(built: dict[str, Any], sidecar: dict[str, Any]) -> None:
    path = Path(built["path"])
    assert sidecar["sha256"] == built["sha256"] == digest_file(path)
    assert sidecar["size_bytes"] == path.stat().st_size
    assert path.name == f"{NAME}-{sidecar['digest'][:12]}.sif"
    assert (path.parent / f"{NAME}.sif").resolve() == path
    assert all(check["ok"] for check in sidecar["self_test"]) and len(sidecar["self_test"]) > 10
    base = sidecar["layers"]["base"]
    (archive,) = (path.parents[1] / "bases").glob(f"*-{base['digest'][:12]}.tar")
    assert base["sha256"] == digest_file(archive)


def test_every_locked_package_is_there_in_its_version(sidecar: dict[str, Any]) -> None:
    there = {name.lower().replace("_", "-").replace(".", "-"): version for name, version in sidecar["packages"]["python"].items()}
    for lock in (f"{NAME}.txt", "compiled.txt"):
        for name, entry in locked((CONTAINERS / "locks" / lock).read_text()).items():
            assert there[name] == entry.split("==")[1].split()[0], name
    assert there["hpcutils"] == sidecar["hpcutils"]


def test_every_debian_package_is_the_locked_one(sidecar: dict[str, Any]) -> None:
    lock = debian_lock()
    # On a mirror that has moved on: what the build said of it.
    other = {line.split()[0]: line.split()[-1] for line in sidecar["relocked"]}
    there = sidecar["packages"]["debian"]
    assert {name: version for name, version in there.items() if version != {**lock.versions(), **other}.get(name)} == {}
    assert set(there) == set(lock.base) | set(lock.image) or other


def debian_lock() -> DebianLock:
    return parse_debian_lock((CONTAINERS / f"locks/{NAME}.debian.txt").read_text(), NAME)


def test_a_debian_package_that_is_gone_is_told_before_anything_is_made(built: dict[str, Any], home: Path) -> None:
    """The mirror is the machine's own; the lock asks for a version that no mirror has."""
    shutil.copytree(CONTAINERS, home / "containers")
    lock, version = home / f"containers/locks/{NAME}.debian.txt", debian_lock().base["adduser"]
    lock.write_text(lock.read_text().replace(f"\nadduser={version}\n", "\nadduser=1.0-1\n"))
    for name in ("tmp", "cache"):
        (home / name).mkdir()
    own(home)
    before = tree(home)
    environ = {"HPCUTILS_CONTAINERS": home / "containers", "HPCUTILS_CACHE": home / "cache", "TMPDIR": home / "tmp"}
    variables = {name: str(path) for name, path in environ.items()}
    done = as_user("hpcutils", "build", NAME, check=False, HPCUTILS_RELOCK="", **variables)
    assert done.returncode == ImageError.exit_code, done.stderr
    assert re.search(r"adduser: locked 1\.0-1, available 3\.", done.stderr) and f"hpcutils image lock {NAME}" in done.stderr
    assert "://" not in done.stderr and tree(home) == before
    # Renewed, it is what it was, where the mirror still has all of it.
    lock.unlink()
    as_user("bash", "-c", f"PATH={ROOT}/.venv/bin:$PATH hpcutils image lock {NAME}", cwd=home, **variables)
    renewed = parse_debian_lock(lock.read_text(), "renewed")
    assert set(renewed.base) >= {"libc6", "python3", "apt"} and renewed.image["openmpi-bin"]


def test_python_is_the_one_that_was_promised(sidecar: dict[str, Any]) -> None:
    assert sidecar["python"].startswith("3.11.")


def test_the_image_takes_little_more_than_its_packages(built: dict[str, Any]) -> None:
    """The limit is the project's own; what is over is what no package has: folders, caches, leftovers of a build."""
    sizes = json.loads(as_user("hpcutils", "image", "show", built["path"], "--sizes", "--json").stdout)["sizes"]
    needed = sum(sizes["python"].values()) + sum(sizes["debian"].values())
    assert needed > 10**9
    assert sizes["all_files"] <= 1.2 * needed


def test_nothing_of_the_build_is_left(built: dict[str, Any]) -> None:
    script = """
        for program in gcc g++ cmake make; do command -v $program && echo "a compiler: $program"; done
        ls -A /mnt /var/lib/apt/lists /opt | grep -v -x -e hpcutils-env -e /mnt: -e /var/lib/apt/lists: -e /opt:
        grep -h -o '[a-z]*://[^ ]*' /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null
        test -e /opt/hpcutils-env/bin/pip && echo pip
        true
    """
    assert inside(built, "sh", "-c", script).split() == []


def test_two_ranks_in_the_image_share_a_file_and_sum(built: dict[str, Any], home: Path) -> None:
    """One container, two ranks: Horovod, Keras and collective HDF5 in one program."""
    (home / "ranks.py").write_text(
        "import h5py, horovod.tensorflow as hvd, keras, numpy as np, tensorflow as tf\n"
        "from mpi4py import MPI\n"
        "hvd.init()\n"
        "world = MPI.COMM_WORLD\n"
        "with h5py.File('/data/x.h5', 'w', driver='mpio', comm=world) as file:\n"
        "    data = file.create_dataset('x', (8,), 'f4')\n"
        "    with data.collective:\n"
        "        data[world.rank * 4 : world.rank * 4 + 4] = np.full(4, world.rank + 1, 'f4')\n"
        "with h5py.File('/data/x.h5', 'r', driver='mpio', comm=world) as file:\n"
        "    rows = file['x'][...]\n"
        "model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1, kernel_initializer='ones')])\n"
        "total = hvd.allreduce(tf.reduce_sum(model(rows[None])), op=hvd.Sum)\n"
        "print(f'{hvd.rank()}/{hvd.size()} {float(total)}', flush=True)\n"
    )
    own(home)
    out = inside(built, "mpirun", "-n", "2", "python3", "/data/ranks.py", binds=(bind(home, "/data"),))
    assert sorted(out.split("\n")) == ["", "0/2 24.0", "1/2 24.0"]


def test_values_and_folders_arrive_as_they_are_and_the_hosts_do_not(built: dict[str, Any], home: Path) -> None:
    """Variables with everything that Apptainer, CSV or a shell could misread; home is not seen although it is the folder."""
    values = {"A": "x,y=1,B=2", "C": 'a "b" $HOME `id` $(id) \\', "D": "", "E": "two\nlines", "F": 'q="1"'}
    code = "import json, os, sys; print(json.dumps([dict(os.environ), sys.path, os.listdir('/home'), os.getcwd()]))"
    argv = [*exec_argv(built["path"], env=values, program=find_builder()), PYTHON, "-c", code]
    done = as_user(*argv, cwd=home, PYTHONPATH="/leak", PYTHONHOME="/leak")
    environ, path, homes, folder = json.loads(done.stdout)
    assert {name: environ[name] for name in values} == values
    assert not any("leak" in folder for folder in path)
    assert (homes, folder) == ([], "/")


def test_the_image_itself_keeps_the_hosts_python_out_and_lets_the_caller_in(built: dict[str, Any]) -> None:
    """Without our exec line, too; and what is given on Apptainer's own command line wins."""
    code = "import sys; print([folder for folder in sys.path if 'leak' in folder])"
    plain = [find_builder(), "--quiet", "exec"]
    assert as_user(*plain, built["path"], "python3", "-c", code, PYTHONPATH="/leak").stdout == "[]\n"
    given = as_user(*plain, "--env", "PYTHONPATH=/leak2", built["path"], "python3", "-c", code, PYTHONPATH="/leak")
    assert given.stdout == "['/leak2']\n"


def test_shared_memory_and_tmp_are_the_nodes_own(built: dict[str, Any]) -> None:
    code = "import os; print([os.stat(path).st_dev for path in ('/tmp', '/dev/shm')])"
    assert json.loads(inside(built, PYTHON, "-c", code)) == [os.stat(path).st_dev for path in ("/tmp", "/dev/shm")]  # noqa: PTH116


# How builds behave.


Frozen = tuple[dict[str, Any], dict[str, str]]


def test_a_change_of_hpcutils_own_code_makes_one_layer(built: dict[str, Any], frozen: Frozen) -> None:
    result, _ = frozen
    assert result["made"] == ["code"]
    assert result["digest"] != built["digest"]
    assert inside(result, PYTHON, "-c", "from hpcutils.mark import MARK; print(MARK)") == "frozen\n"
    # The compiled code came along: nobody can write it later.
    assert inside(result, "ls", "/hpcutils-src/hpcutils/__pycache__").count("mark.cpython-311.pyc") == 1
    assert inside(result, "hpcutils", "--version").startswith("hpcutils")


def test_up_to_date_without_the_builder(frozen: Frozen, home: Path) -> None:
    result, variables = frozen
    (home / "apptainer").write_text(f"#!/bin/sh\ntouch {home}/started\nexit 1\n")
    (home / "apptainer").chmod(0o755)
    own(home)
    done = as_user("bash", "-c", f"PATH={home}:$PATH hpcutils build {NAME}", **variables)
    assert result["path"] in done.stdout and "up to date" in done.stderr
    assert not (home / "started").exists()


def test_equal_code_gives_the_same_file_system(frozen: Frozen) -> None:
    result, variables = frozen
    before = file_system(result)
    Path(result["path"]).unlink()
    again = json.loads(as_user("hpcutils", "build", NAME, "--json", **variables).stdout)
    assert again["path"] == result["path"] and again["made"] == ["code"]
    assert file_system(again) == before


def file_system(result: dict[str, Any]) -> str:
    """Return the digest of a SIF's file system (its header has the hour and a random number in it)."""
    listing = subprocess.run([find_builder(), "sif", "list", result["path"]], capture_output=True, text=True, check=True).stdout
    part = next(item for item in parse_listing(listing) if "Squashfs" in item.kind)
    with Path(result["path"]).open("rb") as stream:
        stream.seek(part.start)
        return hashlib.sha256(stream.read(part.end - part.start)).hexdigest()


def test_of_two_builds_one_builds_and_one_waits(built: dict[str, Any], home: Path) -> None:
    variables = [f"{key}={value}" for key, value in changed_code(home, "two").items()]
    argv = [str(SANDBOX), "user", "--", "env", *variables, "hpcutils", "build", NAME, "--json"]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    results = [json.loads(out) for out, _ in outputs]
    assert sorted(result["made"] for result in results) == [[], ["code"]]
    assert results[0]["path"] == results[1]["path"]
    assert sum("waiting for another build" in err for _, err in outputs) == 1


def tree(folder: Path) -> dict[str, str]:
    """Return every file and link under `folder`, but for lock files, and Debian locks renewed on a mirror that has moved on."""
    found = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    links = {str(p.relative_to(folder)): str(p.readlink()) if p.is_symlink() else str(p.stat().st_mtime_ns) for p in found}
    return {name: value for name, value in links.items() if not name.endswith(".lock") and not name.startswith("cache/locks/")}


def processes_of_builds(folder: Path) -> str:
    """Return the processes that have the folder in their command, work in it, or hold a file in it open (also a removed one)."""
    listing = subprocess.run(["pgrep", "-u", USER, "-a", "-f", str(folder)], capture_output=True, text=True, check=False).stdout
    links = [*Path("/proc").glob("[0-9]*/cwd"), *Path("/proc").glob("[0-9]*/fd/*")]
    inside = [str(path) for path in links if _target(path).startswith(str(folder))]
    return listing + " ".join(inside)


def build_of(folder: Path) -> int:
    """Return the process of the build that has `folder` for its cache."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            argv, environ = (path.parent / "cmdline").read_bytes().split(b"\0"), path.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"HPCUTILS_CACHE={folder}/cache".encode() in environ and "python" in Path(os.fsdecode(argv[0])).name:
            return int(path.parent.name)
    raise AssertionError("the build is not running")


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


def scraps_of_pip() -> set[Path]:
    """Return what the user's pip left in the machine's /tmp; other people's pip is none of ours."""
    return {path for path in Path("/tmp").glob("pip-*") if path.stat().st_uid == pwd.getpwnam(USER).pw_uid}


@pytest.mark.parametrize("layer", ["base", "environment", "code"])
def test_a_build_that_is_ended_leaves_the_old_image_and_nothing_else(built: dict[str, Any], home: Path, layer: str) -> None:
    cache = Path(built["path"]).parents[1]
    (home / "images").mkdir()
    (home / "images" / f"{NAME}-{'0' * 12}.sif").write_text("the old image")
    (home / "images" / f"{NAME}.sif").symlink_to(f"{NAME}-{'0' * 12}.sif")
    variables = {**changed_code(home, "newer"), "HPCUTILS_CACHE": str(home / "cache"), "TMPDIR": str(home / "tmp")}
    variables["PYTHONDONTWRITEBYTECODE"] = "1"
    # A cache that lacks this layer; the ones below it are there.
    (home / "tmp").mkdir()
    (home / "cache").mkdir()
    for name in {"base": (), "environment": ("bases",), "code": ("bases", "layers")}[layer]:
        shutil.copytree(cache / name, home / "cache" / name, copy_function=os.link)
    own(home)
    before, scraps = tree(home), scraps_of_pip()
    process = subprocess.Popen(
        [str(SANDBOX), "user", "--", "env", *(f"{key}={value}" for key, value in variables.items()), "hpcutils", "build", NAME],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    # Well into the layer: its first line of progress where it has one.
    wanted = {"base": f"{NAME}: base", "environment": "Python packages", "code": "self-test"}[layer]
    seen = next((line for line in process.stderr if wanted in line), "")
    assert seen, "the build said nothing of the layer"
    # Well in it, and not yet out of it: the self-test alone takes some seconds.
    time.sleep(0.5 if layer == "code" else 2)
    os.kill(build_of(home), signal.SIGTERM)
    process.wait(timeout=60)
    assert process.returncode != 0
    assert tree(home) == before
    assert processes_of_builds(home) == ""
    # The build has a /tmp of its own: nothing of it is in the machine's.
    assert scraps_of_pip() <= scraps


def test_a_wrong_hash_fails_the_build_and_shows_no_address(built: dict[str, Any], home: Path) -> None:
    """Also: that hashes are checked at all."""
    shutil.copytree(CONTAINERS, home / "containers")
    lock = home / f"containers/locks/{NAME}.txt"
    entry = locked(lock.read_text())["absl-py"]
    lock.write_text(lock.read_text().replace(entry, f"absl-py==2.5.1 \\\n    --hash=sha256:{'0' * 64}\n"))
    (home / "tmp").mkdir()
    (home / "cache").mkdir()
    shutil.copytree(Path(built["path"]).parents[1] / "bases", home / "cache/bases", copy_function=os.link)
    own(home)
    before = tree(home)
    environ = {"HPCUTILS_CONTAINERS": home / "containers", "HPCUTILS_CACHE": home / "cache", "TMPDIR": home / "tmp"}
    done = as_user("hpcutils", "build", NAME, check=False, **{name: str(path) for name, path in environ.items()})
    assert done.returncode == ImageError.exit_code
    assert "DO NOT MATCH THE HASHES" in done.stderr and "absl-py" in done.stderr
    assert "://" not in done.stderr
    assert tree(home) == before


# A guide, followed.


def test_adding_a_package_by_the_guide(built: dict[str, Any], home: Path) -> None:
    """The files and commands of docs/guides/add-a-package.md, as they stand there."""
    guide = (ROOT / "docs/guides/add-a-package.md").read_text()
    recipe, wanted = re.findall(r"```(?:toml|text)\n(.*?)```", guide, re.DOTALL)
    (home / "mine.toml").write_text(recipe)
    (home / "mine.in").write_text(wanted)
    own(home)
    lock, dry_run, build, diff = (line.strip() for line in guide.splitlines() if line.startswith("    "))
    # uv is the tests' own, and images go where they are removed afterwards; the layers below are those of the standard image.
    variables = {"PATH": f"{ROOT}/.venv/bin:/usr/local/bin:/usr/bin:/bin", "HPCUTILS_IMAGES": str(home / "images")}
    as_user("bash", "-c", lock, cwd=home, **variables)
    assert set(locked((home / "mine.txt").read_text())) == {"tomlkit"}
    assert "git" in as_user("bash", "-c", dry_run, cwd=home, **variables).stdout
    (home / "images").mkdir()
    for path in Path(built["path"]).parent.glob(f"{Path(built['path']).stem}*"):
        os.link(path, home / "images" / path.name)
    (home / f"images/{NAME}.sif").symlink_to(Path(built["path"]).name)
    own(home / "images")
    path = as_user("bash", "-c", build, cwd=home, **variables).stdout.strip()
    assert inside({"path": path}, "git", "--version").startswith("git version")
    assert inside({"path": path}, PYTHON, "-c", "import tomlkit, tensorflow; print(tensorflow.__version__)") == "2.18.1\n"
    said = as_user("bash", "-c", diff, cwd=home, **variables).stdout.splitlines()
    packages = [line for line in said if line.startswith("package  ")]
    assert any(line.startswith("package  python tomlkit: none → ") for line in packages)
    # What was there stays in its version.
    assert all(": none → " in line for line in packages)
    # Horovod and h5py were not compiled again: the wheels are the standard image's.
    layers = [json.loads(Path(each).with_suffix(".json").read_text())["layers"] for each in (path, built["path"])]
    assert layers[0]["wheels"] == layers[1]["wheels"]
    for layer in (Path(built["path"]).parents[1] / "layers").glob("mine-*.sif"):
        layer.unlink()


# The other format.


SMALL = """
name = "small"
summary = "no more than a test needs"
variant = "cpu"
[base]
suite = "bookworm"
packages = ["ca-certificates", "python3", "python3-venv"]
epoch = 1735689600
[system]
lock = "small.debian.txt"
[python]
version = "3.11"
lock = "small.txt"
[compile]
tools_lock = "none.txt"
lock = "none.txt"
[environment]
GREETING = "it's $HOME"
[[files]]
source = "motd"
target = "/etc/motd"
mode = "0604"
[[self_test]]
script = "t.py"
"""
SELF_TEST = """
import json, os, stat, click
motd = os.stat("/etc/motd")
checks = {"mode": stat.S_IMODE(motd.st_mode) == 0o604, "variable": os.environ["GREETING"] == "it's $HOME",
          "code": __import__("hpcutils") is not None, "compiled": os.path.isdir("/hpcutils-src/hpcutils/__pycache__")}
rows = [{"check": name, "ok": ok, "seconds": 0, "seen": str(ok)} for name, ok in checks.items()]
print(json.dumps({"checks": rows, "packages": {"python": {"click": click.__version__}, "debian": {}}, "python": "3.11"}))
"""


def small_recipe(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    entries = locked((CONTAINERS / f"locks/{NAME}.txt").read_text())
    files = {"small.toml": SMALL, "small.txt": entries["click"], "none.txt": "", "motd": "hello\n", "t.py": SELF_TEST}
    files["small.debian.txt"] = (CONTAINERS / f"locks/{NAME}.debian.txt").read_text()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder / "small.toml"


def test_the_same_recipe_for_docker_and_on_top_of_an_archive(built: dict[str, Any], home: Path) -> None:
    """buildah builds the Dockerfile as an ordinary user, Apptainer builds on the archive that it made: both pass the same tests."""
    require(shutil.which("buildah") is not None, "buildah")
    small_recipe(home / "small")
    for name in ("tmp", "cache"):
        (home / name).mkdir()
    shutil.copytree(Path(built["path"]).parents[1] / "bases", home / "cache/bases", copy_function=os.link)
    own(home)
    variables = {"HPCUTILS_CACHE": str(home / "cache"), "TMPDIR": str(home / "tmp")}
    words = ["hpcutils", "build", str(home / "small/small.toml"), "--json"]
    made = as_user(*words, "--format", "docker", "--builder", "buildah", **variables)
    archive = json.loads(made.stdout)
    assert archive["path"].endswith(".oci.tar") and "built by buildah" in made.stderr
    assert list((home / "tmp").iterdir()) == []
    # An archive can be tested at any time, as a SIF can, and leaves as little behind.
    tested = json.loads(as_user("hpcutils", "image", "test", archive["path"], "--json", **variables).stdout)
    assert tested["ok"] and {check["check"] for check in tested["checks"]} == {"mode", "variable", "code", "compiled"}
    assert list((home / "tmp").iterdir()) == []
    assert "up to date" in as_user(*words, "--format", "docker", **variables).stderr

    base = f'archive = "{archive["path"]}"\nsha256 = "{archive["sha256"]}"\npackages = ["python3"]\n'
    text = SMALL.replace('packages = ["ca-certificates", "python3", "python3-venv"]\nepoch = 1735689600\n', base)
    # The base is an image of ours already: its environment's folder is made anew.
    (home / "small/small.toml").write_text(text.replace('name = "small"', 'name = "small-on-archive"'))
    (home / "small/motd").write_text("another\n")
    sif = json.loads(as_user(*words, **variables).stdout)
    assert sif["made"] == ["environment", "code"]
    assert inside(sif, "cat", "/etc/motd") == "another\n"
    # Built again from nothing, every file is the same. (What is drawn from chance by the tools would be told.)
    shutil.copy(sif["path"], home / "before.sif")
    again = json.loads(as_user(*words, "--force", **variables).stdout)
    assert (again["path"], again["made"]) == (sif["path"], ["environment", "code"])
    said = as_user("hpcutils", "image", "diff", str(home / "before.sif"), again["path"], "--files", "--json", **variables).stdout
    differs = json.loads(said)
    assert [differs[kind] for kind in ("only_first", "only_second", "changed")] == [[], [], []]
    # Apptainer itself writes a few files, and folders get the hour in which a file was put into them: no package has one.
    assert not [path for path in differs["dates"] if "/click" in path or path.endswith((".py", ".so", ".pyc"))]
    Path(archive["path"]).write_bytes(b"another")
    refused = as_user(*words, "--force", check=False, **variables)
    assert refused.returncode == ImageError.exit_code and "the recipe says" in refused.stderr


def test_root_builds_only_where_it_has_all_its_rights() -> None:
    """Either answer is right; a build that starts and dies is not."""
    try:
        check_builder_rights()
    except ImageError as exc:
        assert "ordinary user" in (exc.hint or "")
        done = subprocess.run(
            [str(ROOT / ".venv/bin/hpcutils"), "build", NAME, "--force"], capture_output=True, text=True, check=False
        )
        assert done.returncode == ImageError.exit_code and "hint: build as an ordinary user" in done.stderr


def test_the_installer_is_quick_when_all_is_there() -> None:
    start = time.monotonic()
    done = subprocess.run([str(CONTAINERS / "install-apptainer")], capture_output=True, text=True, check=True)
    assert "ok: " in done.stdout and "://" not in done.stdout + done.stderr
    assert time.monotonic() - start < 5
