"""Reading a recipe: TOML, the recipe that it extends, and every file that either names.

A recipe that extends another says only what is different: tables are joined key by key, lists are added to, anything else is
replaced. `base` is replaced as a whole; entries of lists of tables replace the one of the same name (target, script).
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from hpcutils.errors import SpecError
from hpcutils.specs.debian import parse_debian_lock
from hpcutils.specs.recipe import ArchiveBase, DebianBase, Recipe, RecipeFiles

# Where a recipe names files; `*` stands for each item of a list.
FILE_KEYS = (
    ("base", "archive"),
    ("system", "lock"),
    ("system", "extra_locks", "*"),
    ("python", "lock"),
    ("python", "extra_locks", "*"),
    ("compile", "lock"),
    ("compile", "tools_lock"),
    ("self_test", "*", "script"),
    ("files", "*", "source"),
)
# What tells the items of a list of tables apart.
IDENTITIES = ("name", "target", "script")
BASE_TAGS = ("debian", "image", "archive")


def read_recipe(path: Path, roots: Sequence[Path] = ()) -> RecipeFiles:
    """Read a recipe, what it extends, and all that they name.

    Args:
        path: The recipe's file; file names in it are relative to its folder.
        roots: Folders in which recipes that are extended by name are looked for, after the recipe's own.

    Raises:
        SpecError: Not TOML, an unknown key, a wrong value, a missing file, a lock that disagrees with the recipe, recipes that
            extend each other, or packages that do not go together. Every problem is a line `file: key: what is wrong`.
    """
    recipe = checked(recipe_data(path, roots), path.name)
    locks = [("python.lock", recipe.python.lock), *(("python.extra_locks", name) for name in recipe.python.extra_locks)]
    lock = "".join(_ended(_text(name, path, key)) for key, name in locks)
    compile_lock = _text(recipe.compile.lock, path, "compile.lock")
    check_locks(recipe, lock, compile_lock, path.name)
    debian_lock = read_debian_lock(recipe, path)
    check_debian_lock(recipe, debian_lock, path.name)
    return RecipeFiles(
        recipe,
        lock=lock,
        compile_lock=compile_lock,
        tools_lock=_text(recipe.compile.tools_lock, path, "compile.tools_lock"),
        self_tests=tuple(_text(test.script, path, "self_test.script") for test in recipe.self_test),
        copied=tuple(_read(Path(file.source), path, "files.source") for file in recipe.files),
        archive=Path(recipe.base.archive) if isinstance(recipe.base, ArchiveBase) else None,
        debian_lock=debian_lock,
    )


def parse_recipe(text: str, name: str) -> Recipe:
    """Return the recipe in a TOML `text` that extends no other; `name` is how messages call it."""
    return checked(parse_toml(text, name), name)


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """Return what is in a TOML `text`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise SpecError(f"{name}: not valid TOML: {exc}") from exc


def checked(data: Mapping[str, Any], name: str) -> Recipe:
    """Return the recipe in `data`."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as exc:
        raise SpecError("\n".join(f"{name}: {problem(row, Recipe)}" for row in exc.errors())) from exc


def joined(below: Any, above: Any) -> Any:
    """Return the value of a recipe that says `above` and extends one that says `below`."""
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: joined(below[key], value) if key in below else value for key, value in above.items()}
    if isinstance(below, list) and isinstance(above, list):
        replaced = {_identity(item) for item in above}
        return [item for item in below if _identity(item) not in replaced] + above
    return above


def locked(lock: str) -> dict[str, str]:
    """Return the entries of a lock: name of the package → its whole requirement, hashes included."""
    return dict(_entries(lock))


def check_locks(recipe: Recipe, lock: str, compile_lock: str, name: str) -> None:
    """Raise `SpecError` where a lock has not the version that the recipe says, has no hash, or names an address."""
    packages, compiled = locked(lock), locked(compile_lock)
    wanted = [("python.pins", package, version, packages) for package, version in recipe.python.pins.items()]
    wanted += [("compile.packages", p.name, p.version, compiled) for p in recipe.compile.packages]
    problems = [
        f"{name}: {key}: {package} {version} was expected in the lock, it has {version_of(entries.get(package))}"
        for key, package, version, entries in wanted
        if version_of(entries.get(package)) != version
    ]
    names = [package for package, _ in _entries(lock)]
    twice = sorted({package for package in names if names.count(package) > 1})
    problems += [f"{name}: python.extra_locks: {package} is in two locks" for package in twice]
    for text in (lock, compile_lock):
        bare = [package for package, entry in locked(text).items() if "--hash=" not in entry]
        problems += [f"{name}: {package}: no hash in the lock" for package in bare]
        if re.search(r"://|^\s*-", re.sub(r"^\s+--hash=.*$", "", text, flags=re.MULTILINE), flags=re.MULTILINE):
            problems.append(f"{name}: a lock holds names, versions and hashes; addresses and options belong in pip.conf")
    if problems:
        raise SpecError("\n".join(problems), "'hpcutils image lock' makes the locks from their .in files")


def read_debian_lock(recipe: Recipe, path: Path) -> str:
    """Return the text of a recipe's Debian locks, one after the other; empty for one that names none."""
    named = [("system.lock", name) for name in (recipe.system.lock,) if name is not None]
    named += [("system.extra_locks", name) for name in recipe.system.extra_locks]
    return "".join(_ended(_text(name, path, key)) for key, name in named)


def check_debian_lock(recipe: Recipe, text: str, name: str) -> None:
    """Raise `SpecError` where a Debian package that the recipe asks for is not locked: it would be another one next month."""
    hint = f"'hpcutils image lock {recipe.name}' makes the locks; a recipe that adds to another names its own in system.extra_locks"
    lock = parse_debian_lock(text, f"{name}: system.lock")
    asked = {
        "base.packages": (recipe.base.packages, lock.base if isinstance(recipe.base, DebianBase) else lock.versions()),
        "system.packages": (recipe.system.packages, {**lock.base, **lock.image}),
        "compile.system_packages": (recipe.compile.system_packages, {**lock.base, **lock.compile}),
    }
    if recipe.system.lock is None and any(packages for packages, _ in asked.values()):
        raise SpecError(f"{name}: system.lock: this key is required: a file that says the version of every Debian package", hint)
    problems = [
        f"{name}: {key}: {package} is not in the Debian lock"
        for key, (packages, locked_ones) in asked.items()
        for package in packages
        if package not in locked_ones
    ]
    if problems:
        raise SpecError("\n".join(problems), hint)


def version_of(entry: str | None) -> str:
    """Return the version in an entry of a lock."""
    match = re.match(r"[^=]+==\s*([^\s;\\]+)", entry or "")
    return "none" if match is None else match.group(1)


def problem(row: Mapping[str, Any], root: type[BaseModel]) -> str:
    """Return one line for one of pydantic's findings in a `root`: the key, and what is wrong with it."""
    location = [part for i, part in enumerate(row["loc"]) if part != "[key]" and not (i == 1 and part in BASE_TAGS)]
    key = ".".join(str(part) for part in location) or "recipe"
    if row["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _keys(root, row["loc"][:-1]), n=1)
        return f"{key}: unknown key" + (f"; did you mean '{near[0]}'?" if near else "")
    if row["type"] == "missing":
        return f"{key}: this key is required"
    message = str(row["msg"]).removeprefix("Value error, ")
    return f"{key}: {message}" + ("" if row["type"] == "value_error" else f"; got {row['input']!r}")


def recipe_data(path: Path, roots: Sequence[Path] = (), chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return what a recipe says, file names made absolute, on top of what it extends."""
    if path.resolve() in chain:
        names = " → ".join(link.name for link in (*chain, path))
        raise SpecError(f"{path.name}: extends: recipes extend each other: {names}")
    data = own_data(path)
    name = data.pop("extends", None)
    if name is None:
        return data
    if not isinstance(name, str):
        raise SpecError(f"{path.name}: extends: the name or file of a recipe was expected, got {name!r}")
    below = recipe_data(_extended(name, path, roots), roots, (*chain, path.resolve()))
    # A recipe that is wrong by itself is told under its own name.
    checked(below, name)
    # Two images of one name would take each other's place.
    del below["name"]
    if "base" in data:
        del below["base"]
    result: dict[str, Any] = joined(below, data)
    return result


def own_data(path: Path) -> dict[str, Any]:
    """Return what a recipe says itself, file names made absolute."""
    return _anchored(parse_toml(_read(path, path, "recipe").decode("utf-8", "replace"), path.name), path.parent)


def _extended(name: str, path: Path, roots: Sequence[Path]) -> Path:
    if name.endswith(".toml"):
        return path.parent / name
    folders = [path.parent, *(root / "recipes" for root in roots)]
    found = next((file for folder in folders if (file := folder / f"{name}.toml").is_file()), None)
    if found is None:
        raise SpecError(f"{path.name}: extends: no recipe is called {name!r}", "give its name, or the path of its file")
    return found


def _anchored(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return `data` with each file name made absolute: what extends this recipe lies elsewhere."""
    for keys in FILE_KEYS:
        data = _replaced(data, keys, folder)
    return data


def _replaced(value: Any, keys: tuple[str, ...], folder: Path) -> Any:
    if not keys:
        return str((folder / value).resolve()) if isinstance(value, str) else value
    if keys[0] == "*":
        return [_replaced(item, keys[1:], folder) for item in value] if isinstance(value, list) else value
    if not isinstance(value, dict) or keys[0] not in value:
        return value
    return value | {keys[0]: _replaced(value[keys[0]], keys[1:], folder)}


def _identity(item: Any) -> Any:
    named = (item[key] for key in IDENTITIES if isinstance(item, dict) and isinstance(item.get(key), str))
    return next(named, repr(item))


def _entries(lock: str) -> list[tuple[str, str]]:
    entries = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)[1:]
    return [(entry.partition("==")[0].strip().lower(), entry.rstrip() + "\n") for entry in entries]


def _ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def _text(name: str, recipe: Path, key: str) -> str:
    return _read(Path(name), recipe, key).decode("utf-8", "replace")


def _read(path: Path, recipe: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise SpecError(f"{recipe.name}: {key}: {path}: {exc.strerror}", "file names are relative to the recipe") from exc


def _keys(model: Any, location: Sequence[Any]) -> list[str]:
    """Return the keys that are known in the table at `location`."""
    extra = ["extends"] if not location else []
    models: list[Any] = []
    for part in location:
        if not isinstance(part, str):
            continue
        if part in model.model_fields:
            models = _models(model.model_fields[part].annotation)
            model = models[0] if models else model
        elif part in BASE_TAGS:
            model = models[BASE_TAGS.index(part)]
    return [*model.model_fields, *extra]


def _models(annotation: Any) -> list[Any]:
    """Return the models in an annotation: tuple[CompiledPackage, ...] and unions hide them among their arguments."""
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
