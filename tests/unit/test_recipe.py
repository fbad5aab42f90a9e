"""Reading recipes: what is accepted, and how each mistake is told."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcutils.errors import SpecError
from hpcutils.specs.debian import DebianLock, parse_debian_lock
from hpcutils.specs.recipe import ArchiveBase, ImageBase, RecipeFiles
from hpcutils.specs.recipe_file import joined, locked, parse_recipe, read_recipe

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "containers"
NAME = "tf-horovod-cpu"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of containers/, to break."""
    shutil.copytree(CONTAINERS, tmp_path / "containers")
    return tmp_path / "containers"


def change(folder: Path, name: str, old: str, new: str) -> Path:
    path = folder / name
    text = path.read_text()
    assert old in text, f"the test's own text is outdated: {old!r}"
    path.write_text(text.replace(old, new, 1))
    return folder / "recipes" / f"{NAME}.toml"


def error(path: Path) -> str:
    with pytest.raises(SpecError) as caught:
        read_recipe(path)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((CONTAINERS / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_read(path: Path) -> None:
    files = read_recipe(path)
    assert isinstance(files, RecipeFiles)
    assert files.recipe.name == path.stem


def test_the_standard_recipe_says_what_the_project_promises() -> None:
    recipe = read_recipe(CONTAINERS / f"recipes/{NAME}.toml").recipe
    assert recipe.python.version == "3.11"
    assert recipe.python.pins["tensorflow-cpu"] == "2.18.1"
    assert {p.name: p.version for p in recipe.compile.packages} == {"h5py": "3.14.0", "horovod": "0.28.1"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('suite = "bookworm"', 'suiet = "bookworm"', "tf-horovod-cpu.toml:8:1: base.suiet: unknown key; did you mean 'suite'?"),
        ('variant = "cpu"', 'variant = "gpu"', "variant: Input should be 'cpu', 'cuda' or 'rocm'; got 'gpu'"),
        ('name = "tf-horovod-cpu"\n', "", "name: this key is required"),
        ("epoch = 1735689600", 'epoch = "today"', "base.epoch: "),
        ('built_against = ["tensorflow-cpu"]', "built_with = []", "compile.packages.1.built_with: unknown key"),
        ('"graphviz"', '"graphviz; true"', "system.packages.0: "),
        ("[environment]", "[environment", "not valid TOML"),
        ('suite = "bookworm"', 'image = "debian:12"', "base.image: "),
        ("ranks = 2", "ranks = 0", "self_test.0.ranks: "),
        ('name = "tf-horovod-cpu"', 'extend = "x"', "extend: unknown key; did you mean 'extends'?"),
    ],
)
def test_a_wrong_key_or_value_is_told_with_file_and_key(folder: Path, old: str, new: str, message: str) -> None:
    assert message in error(change(folder, f"recipes/{NAME}.toml", old, new))


def test_all_mistakes_are_told_at_once(folder: Path) -> None:
    change(folder, f"recipes/{NAME}.toml", 'suite = "bookworm"', 'suite = "sid"')
    said = error(change(folder, f"recipes/{NAME}.toml", "[environment]", "[enviroment]"))
    assert "base.suite" in said and "enviroment: unknown key; did you mean 'environment'?" in said


@pytest.mark.parametrize("version", ["2.19.0", "2.20.1", "3.0.0"])
def test_a_tensorflow_that_horovod_does_not_compile_against_is_refused_with_the_reason(folder: Path, version: str) -> None:
    said = error(change(folder, f"recipes/{NAME}.toml", 'tensorflow-cpu = "2.18.1"', f'tensorflow-cpu = "{version}"'))
    assert f"tensorflow-cpu {version} with horovod 0.28.1" in said
    assert "headers" in said and "2.18" in said


def test_horovod_needs_a_tensorflow(folder: Path) -> None:
    assert "give TensorFlow's version" in error(change(folder, f"recipes/{NAME}.toml", 'tensorflow-cpu = "2.18.1", ', ""))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            'variant = "cpu"',
            'variant = "cuda"',
            "compiled with HOROVOD_GPU_OPERATIONS=NCCL, else it sums gradients",
        ),
        ('variant = "cpu"', 'variant = "cuda"', "variant 'cuda' with tensorflow-cpu: its TensorFlow is distributed as tensorflow"),
        ('variant = "cpu"', 'variant = "rocm"', "HOROVOD_GPU=ROCM"),
        ("HOROVOD_WITH_MPI", "HOROVOD_GPU_OPERATIONS", "there is no CUDA or ROCm in the image"),
        (', "openmpi-bin"]', "]", "horovod with MPI: system.packages has no openmpi-bin"),
        ('"libopenmpi-dev", ', "", "compile.system_packages has no libopenmpi-dev"),
        ('built_against = ["mpi4py", "numpy"]', 'built_against = ["numpy"]', "name mpi4py in its built_against"),
    ],
)
def test_packages_that_do_not_go_together_are_refused_with_the_reason(folder: Path, old: str, new: str, reason: str) -> None:
    assert reason in error(change(folder, f"recipes/{NAME}.toml", old, new))


def changed(folder: Path, *changes: tuple[str, str]) -> str:
    """Return what is said of the standard recipe with these lines replaced."""
    for old, new in changes:
        change(folder, f"recipes/{NAME}.toml", old, new)
    return error(folder / f"recipes/{NAME}.toml")


def flag(line: str) -> tuple[str, str]:
    """One more variable of Horovod's build."""
    return "HOROVOD_WITHOUT_GLOO", f"{line}\nHOROVOD_WITHOUT_GLOO"


CUDA = (('variant = "cpu"', 'variant = "cuda"'), flag('HOROVOD_GPU_OPERATIONS = "NCCL"'))
NCCL = ("pins = {", 'pins = { nvidia-nccl-cu12 = "2.21.5",')


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        # Every Horovod that there is, not only the last.
        ((('version = "0.28.1"', 'version = "0.27.0"'), ('"2.18.1"', '"2.19.0"')), "tensorflow-cpu 2.19.0 with horovod 0.27.0"),
        ((("tensorflow-cpu = ", 'tensorflow = "2.18.1", tensorflow-cpu = '),), "tensorflow and tensorflow-cpu write the same"),
        ((flag('HOROVOD_GPU_ALLREDUCE = "NCCL"'),), "cannot be compiled with HOROVOD_GPU_ALLREDUCE"),
        ((*CUDA, flag('HOROVOD_GPU = "ROCM"')), "cannot be compiled with HOROVOD_GPU=ROCM"),
        (CUDA, "Horovod is linked with NCCL: pin its wheel, nvidia-nccl-cu12"),
        ((*CUDA, NCCL), "horovod is linked with nvidia-nccl-cu12: name it in its built_against"),
        ((('built_against = ["tensorflow-cpu"]', ""),), "horovod is compiled against tensorflow-cpu: name it in its built_against"),
        ((("[environment]", '[environment]\nPATH = "/opt/bin"'),), "environment.PATH: PATH cannot be set: the image puts its own"),
        ((("[environment]", '[environment]\nPYTHONPATH = "/opt"'),), "PYTHONPATH cannot be set: it could lead Python out"),
        ((("[environment]", '[environment]\nPYTHONHOME = ""'),), "PYTHONHOME cannot be set"),
        ((('"graphviz", ', '"graphviz", "graphviz", '),), "system.packages: graphviz is named twice"),
        ((('name = "horovod"', 'name = "h5py"'),), "compile.packages: h5py is named twice"),
    ],
)
def test_what_is_compiled_belongs_to_what_it_is_compiled_for(folder: Path, changes: Any, reason: str) -> None:
    assert reason in changed(folder, *changes)


FILE = '[[files]]\nsource = "../locks/build.in"\ntarget = "{}"\n[[self_test]]'


@pytest.mark.parametrize("target", ["/etc/", "/etc/../mnt/a", "/etc//a", "/./a"])
def test_a_target_names_one_thing_in_one_way(folder: Path, target: str) -> None:
    assert "files.0.target: a path without" in changed(folder, ("[[self_test]]", FILE.format(target)))


@pytest.mark.parametrize("target", ["/mnt/a", "/hpcutils-src/a", "/tmp/a", "/proc/a", "/dev"])
def test_a_target_that_nobody_would_see_is_refused(folder: Path, target: str) -> None:
    assert "stays in an image, or is seen" in changed(folder, ("[[self_test]]", FILE.format(target)))


def test_two_files_of_one_target_are_refused(folder: Path) -> None:
    twice = FILE.format("/etc/a").replace("[[self_test]]", FILE.format("/etc/a"))
    assert "files: /etc/a is named twice" in changed(folder, ("[[self_test]]", twice))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('LC_ALL = "C.UTF-8"', 'LC_ALL = "{{ x }}"', "environment.LC_ALL: '{{' starts a variable of Apptainer's"),
        ('LC_ALL = "C.UTF-8"', 'LC_ALL = "a\\u0000b"', "one line without control characters"),
        ('LC_ALL = "C.UTF-8"', 'LC_ALL = "a\\nb"', "one line without control characters"),
        ('summary = "Keras', 'summary = "\\u001b[31mKeras', "one line without control characters"),
        ('CXXFLAGS = "-std=c++17"', 'CXXFLAGS = "{{ x }}"', "compile.packages.1.environment.CXXFLAGS: "),
        ('"graphviz"', '"python3-"', "system.packages.0: "),
        ("ranks = 2", "ranks = true", "self_test.0.ranks: Input should be a valid integer; got True"),
        ("epoch = 1735689600", 'epoch = "1735689600"', "base.epoch: Input should be a valid integer"),
        ('name = "tf-horovod-cpu"', 'name = "a..b-"', "name: "),
        ('name = "tf-horovod-cpu"', 'name = "a.sif"', "name: a name that ends like a file's"),
    ],
)
def test_odd_values_are_refused(folder: Path, old: str, new: str, message: str) -> None:
    assert message in changed(folder, (old, new))


@pytest.mark.parametrize(
    "line",
    [
        "--extra-index-url https://pypi.example/simple",
        "cmake==3.31.6",
        "a==1 --hash=sha256:00 --extra-index-url=x",
        "a @ file:///a --hash=sha256:00",
    ],
)
def test_the_lock_of_tools_is_held_to_the_same_rules(folder: Path, line: str) -> None:
    lock = folder / "locks/build.txt"
    lock.write_text(f"{lock.read_text()}{line}\n")
    said = error(folder / f"recipes/{NAME}.toml")
    assert ": compile.tools_lock: " in said and ("no hash in the lock" in said or "belong in pip.conf" in said)


def test_two_tensorflows_in_the_lock_are_refused(folder: Path) -> None:
    lock = folder / f"locks/{NAME}.txt"
    lock.write_text(lock.read_text() + f"tensorflow==2.18.1 \\\n    --hash=sha256:{'0' * 64}\n")
    assert "python.lock: tensorflow and tensorflow-cpu in the lock write the same files" in error(folder / f"recipes/{NAME}.toml")


def test_text_that_is_not_utf8_is_refused(folder: Path) -> None:
    """Two texts that differ in such bytes alone would have one digest."""
    path = folder / "selftests/training.py"
    path.write_bytes(path.read_bytes() + b"# \xff\n")
    said = error(folder / f"recipes/{NAME}.toml")
    assert "self_test.script: " in said and "UTF-8 text was expected" in said


def test_every_problem_is_told_with_its_line(folder: Path) -> None:
    """Inside of arrays and inline tables the place is that of their key; what is inside of a text is no key."""
    text = "LINES = ''' [\n[system]\n# '''\nPYTHONPATH = \"\""
    said = changed(folder, ("[environment]", f"[environment]\n{text}"), ('"graphviz", ', '"graphviz; true", '))
    lines = (folder / f"recipes/{NAME}.toml").read_text().splitlines()
    assert len(said.splitlines()) == 2
    for line in said.splitlines():
        file, number, column, key = line.split(":")[:4]
        assert (file, column) == (f"{NAME}.toml", "1")
        wanted = "packages" if "system" in key else key.strip().rpartition(".")[2]
        assert lines[int(number) - 1].startswith(wanted)
    assert re.match(rf"{NAME}\.toml:\d+:\d+: not valid TOML: ", changed(folder, ("[[self_test]]", "[[self_test]")))


def test_a_problem_of_joined_lists_is_told_where_it_was_written(tmp_path: Path) -> None:
    """The second entry of the joined list is the first of the file."""
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nsummary = "s"\nextends = "tf-horovod-cpu"\n[[compile.packages]]\nname = "h5py"\nversion = "3.14.0"\n'
        'built_against = ["numpy"]\nenvironment = { HDF5_MPI = "ON" }\n'
    )
    with pytest.raises(SpecError, match=r"^mine\.toml:7:1: compile\.packages\.1\.built_against: "):
        read_recipe(tmp_path / "mine.toml", [CONTAINERS])


# Recipes that extend others.

MINE = """
name = "mine"
summary = "with more"
extends = "tf-horovod-cpu"
[system]
packages = ["git", "graphviz"]
extra_locks = ["mine.debian.txt"]
[python]
extra_locks = ["mine.txt"]
[environment]
LC_ALL = "C"
MINE = "1"
[[files]]
source = "motd"
target = "/etc/motd"
[[compile.packages]]
name = "h5py"
version = "3.14.0"
built_against = ["mpi4py"]
"""
EXTRA = f"tomlkit==0.13.3 \\\n    --hash=sha256:{'0' * 64}\n"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A recipe of a user's own, in a folder of its own."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/motd").write_text("hello\n")
    (tmp_path / "own/mine.txt").write_text(EXTRA)
    (tmp_path / "own/mine.debian.txt").write_text("[image]\ngit=1:2.39.5-0+deb12u3\n")
    (tmp_path / "own/mine.toml").write_text(MINE)
    return tmp_path / "own/mine.toml"


def test_a_recipe_says_only_what_is_different(mine: Path) -> None:
    below, files = read_recipe(CONTAINERS / f"recipes/{NAME}.toml"), read_recipe(mine, [CONTAINERS])
    recipe = files.recipe
    assert (recipe.name, recipe.variant, recipe.base) == ("mine", "cpu", below.recipe.base)
    # Added to, and nothing twice.
    assert recipe.system.packages == (*(p for p in below.recipe.system.packages if p != "graphviz"), "git", "graphviz")
    assert recipe.environment == below.recipe.environment | {"LC_ALL": "C", "MINE": "1"}
    # Replaced by name.
    assert [package.name for package in recipe.compile.packages] == ["horovod", "h5py"]
    assert recipe.compile.packages[1].built_against == ("mpi4py",)
    # Each file from where it was named.
    assert files.lock == below.lock + EXTRA
    assert files.debian_lock == below.debian_lock + "[image]\ngit=1:2.39.5-0+deb12u3\n"
    assert (files.copied, files.self_tests) == ((b"hello\n",), below.self_tests)


def test_a_recipe_extends_a_file_that_extends_another(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper/third.toml").write_text('name = "third"\nsummary = "s"\nextends = "../own/mine.toml"\n')
    files = read_recipe(tmp_path / "deeper/third.toml", [CONTAINERS])
    assert files.recipe.name == "third" and "git" in files.recipe.system.packages and files.copied == (b"hello\n",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('summary = "s"\nextends = "tf-horovod-cpu"', "mine.toml:1:1: name: this key is required"),
        ('name = "a"\nsummary = "s"\nextends = "nothing"', "mine.toml:3:1: extends: no recipe is called 'nothing'"),
        ('name = "a"\nsummary = "s"\nextends = 3', "mine.toml:3:1: extends: the name or file of a recipe was expected, got 3"),
        ('name = "a"\nsummary = "s"\nextends = "mine.toml"', "recipes extend each other: mine.toml → mine.toml"),
        ('name = "a"\nsummary = "s"\nextends = "gone.toml"', "gone.toml: recipe: "),
        (MINE.replace("mine.txt", "gone.txt"), "python.extra_locks: "),
        (MINE.replace('source = "motd"', 'source = "gone"'), "files.source: "),
        (MINE.replace("[python]\n", '[python]\npins.tensorflow-cpu = "2.19.0"\n'), "no longer ship the LLVM and XLA headers"),
    ],
)
def test_what_is_wrong_with_an_extending_recipe_is_told(mine: Path, text: str, message: str) -> None:
    mine.write_text(text)
    with pytest.raises(SpecError) as caught:
        read_recipe(mine, [CONTAINERS])
    assert message in str(caught.value)


def test_a_package_in_two_locks_is_refused(mine: Path) -> None:
    """pip would say `double requirement given`, minutes later."""
    (mine.parent / "mine.txt").write_text(EXTRA.replace("tomlkit==0.13.3", "keras==3.15.1"))
    with pytest.raises(SpecError, match="keras is in two locks"):
        read_recipe(mine, [CONTAINERS])


def test_a_broken_recipe_is_told_under_its_own_name(mine: Path, folder: Path) -> None:
    change(folder, f"recipes/{NAME}.toml", 'variant = "cpu"', 'variant = "gpu"')
    with pytest.raises(SpecError, match=r"tf-horovod-cpu\.toml:5:1: variant: Input should be"):
        read_recipe(mine, [folder])


@pytest.mark.parametrize(
    "base", [f'image = "registry.example/debian@sha256:{"0" * 64}"', f'archive = "base.oci.tar"\nsha256 = "{"0" * 64}"']
)
def test_another_base_replaces_the_whole_of_it(mine: Path, base: str) -> None:
    mine.write_text(f'{MINE}\n[base]\nsuite = "bookworm"\n{base}\n')
    files = read_recipe(mine, [CONTAINERS])
    assert type(files.recipe.base) is (ArchiveBase if "archive" in base else ImageBase)
    assert files.archive == (mine.parent / "base.oci.tar" if "archive" in base else None)


def test_a_debian_package_that_is_not_locked_is_refused(mine: Path, folder: Path) -> None:
    said = error(change(folder, f"recipes/{NAME}.toml", '"graphviz", ', '"graphviz", "git", '))
    assert "tf-horovod-cpu.toml:17:1: system.packages: git is not in the Debian lock" in said
    assert "hpcutils image lock tf-horovod-cpu" in said
    said = error(change(folder, f"recipes/{NAME}.toml", 'lock = "../locks/tf-horovod-cpu.debian.txt"\n', ""))
    assert "system.lock: this key is required" in said
    (mine.parent / "mine.debian.txt").write_text("[compile]\ngit=1:2.39.5-0+deb12u3\n")
    with pytest.raises(SpecError, match="git is not in the Debian lock"):
        read_recipe(mine, [CONTAINERS])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[base]\n", "", "name=version under one of [base], [compile], [image] was expected, got 'adduser=3.134'"),
        ("adduser=3.134", "adduser", "got 'adduser'"),
        ("adduser=3.134", "adduser=3.134\nadduser=3.135", "adduser has two versions: 3.134 and 3.135"),
        ("[image]\n", "[image]\nadduser=3.135\n", "adduser has two versions: 3.134 and 3.135"),
        ("[image]", "[images]", "got '[images]'"),
        ("adduser=3.134", "adduser=3.134 https://mirror.example", "was expected"),
    ],
)
def test_what_is_wrong_with_a_debian_lock_is_told(folder: Path, old: str, new: str, message: str) -> None:
    assert message in error(change(folder, f"locks/{NAME}.debian.txt", old, new))


@pytest.mark.parametrize("path", sorted((CONTAINERS / "locks").glob("*.debian.txt")), ids=lambda path: path.stem)
def test_a_debian_lock_is_read_back_as_it_was_written(path: Path) -> None:
    lock = parse_debian_lock(path.read_text(), path.name)
    assert path.read_text().partition("\n")[2] == lock.text()
    assert len(lock.base) > 100 and lock.compile["g++"] and lock.image["openmpi-bin"]
    assert lock.without(lock) == DebianLock()


def test_a_lock_with_another_version_is_refused(folder: Path) -> None:
    said = error(change(folder, f"locks/{NAME}.txt", "keras==3.15.1", "keras==3.14.0"))
    assert "keras 3.15.1 was expected in the lock, it has 3.14.0" in said


def test_a_lock_without_a_hash_is_refused(folder: Path) -> None:
    lock = folder / f"locks/{NAME}.txt"
    lock.write_text(lock.read_text() + "requests-extra==1.0\n")
    assert "requests-extra: no hash in the lock" in error(folder / f"recipes/{NAME}.toml")


@pytest.mark.parametrize("line", ["--index-url https://pypi.example/simple", "--extra-index-url=file:///srv", "-r other.txt"])
def test_a_lock_with_an_address_is_refused(folder: Path, line: str) -> None:
    lock = folder / f"locks/{NAME}.txt"
    lock.write_text(f"{line}\n{lock.read_text()}")
    assert "addresses and options belong in pip.conf" in error(folder / f"recipes/{NAME}.toml")


def test_a_missing_file_is_told_with_its_key(folder: Path) -> None:
    (folder / "locks/build.txt").unlink()
    assert "compile.tools_lock: " in error(folder / f"recipes/{NAME}.toml")


def test_locked_splits_a_lock_into_whole_requirements() -> None:
    lock = "# made by a tool\na==1 \\\n    --hash=sha256:00 \\\n    --hash=sha256:01\nb-c==2 \\\n    --hash=sha256:02\n"
    assert locked(lock) == {
        "a": "a==1 \\\n    --hash=sha256:00 \\\n    --hash=sha256:01\n",
        "b-c": "b-c==2 \\\n    --hash=sha256:02\n",
    }


@pytest.mark.parametrize("path", sorted((CONTAINERS / "locks").glob("*.txt")), ids=lambda path: path.stem)
def test_no_lock_names_an_address(path: Path) -> None:
    text = path.read_text()
    assert "://" not in text
    # apt checks Debian's own signature over what each version is.
    assert path.name.endswith(".debian.txt") or (all("--hash=sha256:" in entry for entry in locked(text).values()) and locked(text))


texts = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=1), inner),
)
tables = st.dictionaries(st.text("abc", max_size=1), texts, max_size=3)


@given(below=tables, above=tables)
def test_what_is_said_above_wins_and_nothing_else_is_lost(below: dict[str, Any], above: dict[str, Any]) -> None:
    result = joined(below, above)
    assert joined(result, above) == result, "saying it twice changes nothing"
    assert set(result) == set(below) | set(above)
    assert all(result[key] == value for key, value in below.items() if key not in above)
    assert all(result[key] == value for key, value in above.items() if not isinstance(value, list | dict))


def test_a_recipe_is_frozen() -> None:
    recipe = parse_recipe((CONTAINERS / f"recipes/{NAME}.toml").read_text(), NAME)
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]
