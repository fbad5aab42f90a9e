"""Reading recipes: what is accepted, and how each mistake is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hpcutils.errors import SpecError
from hpcutils.specs.recipe import RecipeFiles, locked, parse_recipe, read_recipe

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
        ('suite = "bookworm"', 'suiet = "bookworm"', "tf-horovod-cpu.toml: base.suiet: unknown key; did you mean 'suite'?"),
        ('variant = "cpu"', 'variant = "gpu"', "variant: Input should be 'cpu', 'cuda' or 'rocm'; got 'gpu'"),
        ('name = "tf-horovod-cpu"\n', "", "name: this key is required"),
        ("epoch = 1735689600", 'epoch = "today"', "base.epoch: "),
        ('built_against = ["tensorflow-cpu"]', "built_with = []", "compile.packages.1.built_with: unknown key"),
        ('"graphviz"', '"graphviz; true"', "system.packages.0: "),
        ("[labels]", "[labels", "not valid TOML"),
    ],
)
def test_a_wrong_key_or_value_is_told_with_file_and_key(folder: Path, old: str, new: str, message: str) -> None:
    assert message in error(change(folder, f"recipes/{NAME}.toml", old, new))


def test_all_mistakes_are_told_at_once(folder: Path) -> None:
    change(folder, f"recipes/{NAME}.toml", 'suite = "bookworm"', 'suite = "sid"')
    said = error(change(folder, f"recipes/{NAME}.toml", "[labels]", "[lables]"))
    assert "base.suite" in said and "lables: unknown key; did you mean 'labels'?" in said


@pytest.mark.parametrize("version", ["2.19.0", "2.20.1", "3.0.0"])
def test_a_tensorflow_that_horovod_does_not_compile_against_is_refused_with_the_reason(folder: Path, version: str) -> None:
    said = error(change(folder, f"recipes/{NAME}.toml", 'tensorflow-cpu = "2.18.1"', f'tensorflow-cpu = "{version}"'))
    assert f"tensorflow-cpu {version} with horovod 0.28.1" in said
    assert "headers" in said and "2.18" in said


def test_horovod_needs_a_tensorflow(folder: Path) -> None:
    assert "give TensorFlow's version" in error(change(folder, f"recipes/{NAME}.toml", 'tensorflow-cpu = "2.18.1", ', ""))


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
    assert all("--hash=sha256:" in entry for entry in locked(text).values()) and locked(text)


def test_a_recipe_is_frozen() -> None:
    recipe = parse_recipe((CONTAINERS / f"recipes/{NAME}.toml").read_text(), NAME)
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]
