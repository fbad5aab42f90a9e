"""What an image's digest depends on: everything that decides its content, and nothing else."""

from __future__ import annotations

import dataclasses
import os
import shutil
import string
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from hpcutils.errors import SpecError
from hpcutils.image.code import CodeFile, code_files
from hpcutils.image.digest import base_digest, code_digest, debian_lock, digest_of, environment_digest, image_digest, wheels_digest
from hpcutils.image.plan import plan_build
from hpcutils.specs.recipe import ArchiveBase, CopiedFile, ImageBase, RecipeFiles
from hpcutils.specs.recipe_file import parse_recipe, read_recipe

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "containers/recipes/tf-horovod-cpu.toml"
CODE = (CodeFile("hpcutils/__init__.py", b"a"), CodeFile("bin/hpcutils", b"b", executable=True))

# File names in a recipe do not count: their contents do.
NAMES_OF_FILES = {"lock", "tools_lock", "extra_locks", "script", "source", "archive"}
DIGEST = "ab" * 32


def standard() -> RecipeFiles:
    """The standard recipe, with something in every place where a recipe can have something."""
    files = read_recipe(RECIPE)
    motd = CopiedFile(source="motd", target="/etc/motd", mode="0644")
    compiling = files.recipe.compile.model_copy(update={"links": {"/opt/tools/lib64": "lib"}})
    more = {"files": (motd,), "compile": compiling, "labels": {"org.example.owner": "somebody"}}
    return dataclasses.replace(files, recipe=files.recipe.model_copy(update=more), copied=(b"hello\n",))


FILES = standard()
BASES = (
    FILES.recipe.base,
    ImageBase(suite="bookworm", image=f"registry.example/debian@sha256:{DIGEST}", packages=("python3",)),
    ArchiveBase(suite="bookworm", archive="base.oci.tar", sha256=DIGEST, packages=("python3",)),
)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where each single value of a nested structure is, keys of mappings included."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]
    if isinstance(value, list | tuple):
        return [leaf for i, item in enumerate(value) for leaf in leaves(item, (*path, i))]
    return [path]


def changed(value: Any, path: tuple[Any, ...]) -> Any:
    """Return a copy with the value at `path` replaced by another of the same type."""
    if not path:
        return {str: lambda: value + "1", int: lambda: value + 1, type(None): lambda: "0" * 64}[type(value)]()
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:])
    return copy


DATA = FILES.recipe.model_dump(mode="python")
LEAVES = [leaf for leaf in leaves(DATA) if not NAMES_OF_FILES & set(leaf)]
BASE_LEAVES = [(base, leaf) for base in BASES for leaf in leaves(base.model_dump()) if leaf[-1] not in NAMES_OF_FILES]


def with_recipe(data: dict[str, Any]) -> RecipeFiles:
    """A recipe with one value changed; validation is left out, as most changes are not allowed yet."""
    recipe = FILES.recipe
    rebuilt = rebuild(type(recipe), data)
    return dataclasses.replace(FILES, recipe=rebuilt)


def rebuild(model: Any, data: dict[str, Any]) -> Any:
    """`model_construct`, for the models inside as well."""
    parts = {}
    for key, value in data.items():
        inner = model.model_fields[key].annotation
        candidates = [kind for kind in (inner, *getattr(inner, "__args__", ())) if hasattr(kind, "model_construct")]
        if candidates and isinstance(value, dict):
            value = rebuild(next(kind for kind in candidates if set(kind.model_fields) == set(value)), value)
        elif candidates:
            value = tuple(rebuild(candidates[0], item) for item in value)
        elif isinstance(value, list):
            value = tuple(value)
        parts[key] = value
    return model.model_construct(**parts)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: ".".join(map(str, leaf)))
def test_every_value_of_a_recipe_counts(leaf: tuple[Any, ...]) -> None:
    assert image_digest(with_recipe(DATA), CODE) == image_digest(FILES, CODE)
    assert image_digest(with_recipe(changed(DATA, leaf)), CODE) != image_digest(FILES, CODE)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize(("base", "leaf"), BASE_LEAVES, ids=lambda value: value[0] if isinstance(value, tuple) else "base")
def test_every_value_of_every_kind_of_base_counts(base: Any, leaf: tuple[Any, ...]) -> None:
    """It counts for every layer; only what is compiled knows nothing of dates."""

    def digests(data: dict[str, Any]) -> set[str]:
        files = with_recipe(DATA | {"base": data})
        wheels = () if leaf == ("epoch",) else (wheels_digest(files),)
        return {*wheels, base_digest(files), environment_digest(files), image_digest(files, CODE)}

    assert not digests(base.model_dump()) & digests(changed(base.model_dump(), leaf))


def test_every_item_of_every_list_counts() -> None:
    """One package, file, label, variable or test less is another image."""
    groups = {leaf[: i + 1] for leaf in LEAVES for i, part in enumerate(leaf) if i and (isinstance(part, int) or i == 1)}
    optional = [group for group in groups if len(at(DATA, group[:-1])) > 1 and not is_model(group[:-1])]
    assert len(optional) > 20
    assert [group for group in optional if image_digest(with_recipe(without(DATA, group)), CODE) == image_digest(FILES, CODE)] == []


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def is_model(path: tuple[Any, ...]) -> bool:
    """Whether a table has fixed keys, which cannot be left out."""
    value: Any = FILES.recipe
    for key in path:
        value = getattr(value, key) if isinstance(value, BaseModel) else value[key]
    return isinstance(value, BaseModel)


def without(value: Any, path: tuple[Any, ...]) -> Any:
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = without(value[path[0]], path[1:])
    return copy


@pytest.mark.parametrize("field", ["lock", "compile_lock", "tools_lock", "self_tests"])
@given(position=st.integers(min_value=0), letter=st.sampled_from(string.hexdigits))
@settings(max_examples=20)
def test_every_character_of_every_file_counts(field: str, position: int, letter: str) -> None:
    given = getattr(FILES, field)
    text = given if isinstance(given, str) else given[0]
    at = position % (len(text) + 1)
    changed = text[:at] + letter + text[at:]
    other = dataclasses.replace(FILES, **{field: changed if isinstance(given, str) else (changed, *given[1:])})
    assert image_digest(other, CODE) != image_digest(FILES, CODE)


@given(position=st.integers(min_value=0), letter=st.sampled_from(string.hexdigits))
@settings(max_examples=50)
def test_every_character_of_a_debian_lock_counts_or_is_refused(position: int, letter: str) -> None:
    text = FILES.debian_lock
    at = position % (len(text) + 1)
    other = dataclasses.replace(FILES, debian_lock=text[:at] + letter + text[at:])
    try:
        assert image_digest(other, CODE) != image_digest(FILES, CODE)
    except SpecError as exc:
        assert "system.lock" in exc.message


@given(content=st.binary())
def test_the_content_of_a_copied_file_counts(content: bytes) -> None:
    other = dataclasses.replace(FILES, copied=(content,))
    assert (environment_digest(other) == environment_digest(FILES)) == (content == b"hello\n")


code = st.lists(
    st.builds(CodeFile, st.text(string.ascii_lowercase + "/_", min_size=1), st.binary(max_size=20), st.booleans()),
    max_size=5,
    unique_by=lambda file: file.name,
)


@given(first=code, second=code)
def test_code_counts_by_name_content_and_mode(first: list[CodeFile], second: list[CodeFile]) -> None:
    assert (code_digest(first) == code_digest(second)) == (set(first) == set(second))


@given(code, st.randoms())
def test_the_order_of_code_files_does_not_count(files: list[CodeFile], random: Any) -> None:
    shuffled = list(files)
    random.shuffle(shuffled)
    assert code_digest(shuffled) == code_digest(files)


parts = st.dictionaries(st.text("ab\0", max_size=4), st.binary(max_size=4), max_size=3)


@given(first=parts, second=parts)
def test_where_a_part_ends_counts(first: dict[str, bytes], second: dict[str, bytes]) -> None:
    # Names are ours and have no NUL: with one, a name could end early and take from its content.
    first, second = ({name.replace("\0", "c"): raw for name, raw in side.items()} for side in (first, second))
    assert (digest_of(first) == digest_of(second)) == (first == second)


def test_where_files_are_and_when_they_were_written_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan_build(str(RECIPE))
    shutil.copytree(ROOT / "containers", tmp_path / "elsewhere")
    shutil.copytree(ROOT / "hpcutils", tmp_path / "copy/hpcutils", ignore=shutil.ignore_patterns("__pycache__"))
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "USER", "HOSTNAME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    after = plan_build(str(tmp_path / "elsewhere/recipes/tf-horovod-cpu.toml"), package=tmp_path / "copy/hpcutils")
    assert after.digest == before.digest
    assert (after.base.name, after.wheels.name, after.environment.name, after.image.name) == (
        before.base.name,
        before.wheels.name,
        before.environment.name,
        before.image.name,
    )


def test_the_names_of_files_beside_a_recipe_do_not_count(tmp_path: Path) -> None:
    text = RECIPE.read_text()
    (tmp_path / "recipes").mkdir()
    locks = {"tf-horovod-cpu.txt": "a.txt", "tf-horovod-cpu.debian.txt": "d.txt", "build.txt": "b.txt", "compiled.txt": "c.txt"}
    for old, new in locks.items():
        shutil.copy(ROOT / "containers/locks" / old, tmp_path / new)
        assert f"../locks/{old}" in text
        text = text.replace(f"../locks/{old}", f"../{new}")
    shutil.copy(ROOT / "containers/selftests/training.py", tmp_path / "t.py")
    path = tmp_path / "recipes/other-name-of-the-file.toml"
    path.write_text(text.replace("../selftests/training.py", "../t.py"))
    assert image_digest(read_recipe(path), CODE) == image_digest(read_recipe(RECIPE), CODE)


def test_a_files_mode_counts_not_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may execute what has any x at all, its owner may not: the digest is the same."""
    (tmp_path / "hpcutils").mkdir()
    for name, mode in {"group.py": 0o654, "plain.py": 0o644}.items():
        (tmp_path / "hpcutils" / name).write_text("")
        (tmp_path / "hpcutils" / name).chmod(mode)
    monkeypatch.setattr(os, "access", lambda *words: False)
    executable = {file.name: file.executable for file in code_files(tmp_path / "hpcutils")}
    assert (executable["hpcutils/group.py"], executable["hpcutils/plain.py"]) == (True, False)


def test_caches_of_python_are_no_code(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "hpcutils/image", tmp_path / "hpcutils", ignore=shutil.ignore_patterns("__pycache__"))
    before = code_files(tmp_path / "hpcutils")
    (tmp_path / "hpcutils/__pycache__").mkdir()
    (tmp_path / "hpcutils/__pycache__/a.cpython-311.pyc").write_bytes(b"x")
    (tmp_path / "hpcutils/.a.swp").write_bytes(b"x")
    assert code_files(tmp_path / "hpcutils") == before


def test_wheels_belong_to_what_they_were_compiled_against() -> None:
    def with_lock(old: str, new: str) -> str:
        assert old in FILES.lock
        return wheels_digest(dataclasses.replace(FILES, lock=FILES.lock.replace(old, new)))

    assert with_lock("tensorflow-cpu==2.18.1", "tensorflow-cpu==2.17.1") != wheels_digest(FILES)
    assert with_lock("mpi4py==4.1.2", "mpi4py==4.1.1") != wheels_digest(FILES)
    # A wheel knows nothing of submitit: compiling again for it would cost minutes.
    assert with_lock("submitit==1.5.4", "submitit==1.5.3") == wheels_digest(FILES)


def test_a_version_in_the_debian_lock_counts_where_it_is_used() -> None:
    def digests(head: str, package: str) -> list[bool]:
        lock = debian_lock(FILES)
        old = f"{package}={lock.section(head)[package]}\n"
        assert old in FILES.debian_lock
        other = dataclasses.replace(FILES, debian_lock=FILES.debian_lock.replace(old, f"{package}=0\n"))
        kinds = (base_digest, wheels_digest, environment_digest)
        return [digest(other) == digest(FILES) for digest in kinds] + [image_digest(other, CODE) == image_digest(FILES, CODE)]

    assert digests("base", "python3.11") == [False, False, False, False]
    assert digests("compile", "g++") == [True, False, False, False]
    # Compiling again for another graphviz would cost minutes.
    assert digests("image", "graphviz") == [True, True, False, False]


def test_another_self_test_needs_no_other_environment() -> None:
    other = dataclasses.replace(FILES, self_tests=("print()",))
    assert environment_digest(other) == environment_digest(FILES)
    assert image_digest(other, CODE) != image_digest(FILES, CODE)


def test_flags_of_compiled_packages_count_for_wheels() -> None:
    index = next(leaf for leaf in LEAVES if leaf[-1] == "HOROVOD_WITH_MPI")
    assert wheels_digest(with_recipe(changed(DATA, index))) != wheels_digest(FILES)


def test_parse_gives_equal_digests_for_another_order_of_keys() -> None:
    text = RECIPE.read_text()
    table = text[text.index("[environment]") : text.index("[[self_test]]")]
    moved = text.replace(table, "").replace("[system]", f"{table}\n[system]")
    assert moved != text
    other = dataclasses.replace(read_recipe(RECIPE), recipe=parse_recipe(moved, "moved"))
    assert environment_digest(other) == environment_digest(read_recipe(RECIPE))
