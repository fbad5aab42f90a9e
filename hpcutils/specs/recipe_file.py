"""Reading a recipe: TOML, the recipe that it extends, and every file that either names.

A recipe that extends another says only what is different: tables are joined key by key, lists are added to, anything else is
replaced. `base` is replaced as a whole; entries of lists of tables replace the one of the same name (target, script).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hpcutils.errors import SpecError
from hpcutils.specs.combinations import TENSORFLOW_NAMES, Location, UnfitPartsError
from hpcutils.specs.debian import parse_debian_lock
from hpcutils.specs.recipe import ArchiveBase, DebianBase, Recipe, RecipeFiles
from hpcutils.specs.toml_findings import location_of, problem
from hpcutils.specs.toml_places import not_toml, places

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
# pip's own way to say what a file of a package is.
HASH = re.compile(r"(?<=\s)--hash=[a-z0-9]+:[0-9a-f]+(?=\s|$)")
IDENTITIES = ("name", "target", "script")


def read_recipe(path: Path, roots: Sequence[Path] = ()) -> RecipeFiles:
    """Read a recipe, what it extends, and all that they name.

    Args:
        path: The recipe's file; file names in it are relative to its folder.
        roots: Folders in which recipes that are extended by name are looked for, after the recipe's own.

    Raises:
        SpecError: Not TOML, an unknown key, a wrong value, a missing file, a lock that disagrees with the recipe, recipes that
            extend each other, or parts that do not go together. Every problem is a line `file:line:column: key: what is wrong`.
    """
    data = recipe_data(path, roots)
    where = Origin(path, roots, data)
    recipe = checked(data, where)
    locks = [("python.lock", recipe.python.lock), *(("python.extra_locks", name) for name in recipe.python.extra_locks)]
    lock = "".join(_ended(_text(name, path, key)) for key, name in locks)
    compile_lock = _text(recipe.compile.lock, path, "compile.lock")
    tools_lock = _text(recipe.compile.tools_lock, path, "compile.tools_lock")
    check_locks(recipe, lock, compile_lock, tools_lock, where)
    debian_lock = read_debian_lock(recipe, path)
    check_debian_lock(recipe, debian_lock, where)
    return RecipeFiles(
        recipe,
        lock=lock,
        compile_lock=compile_lock,
        tools_lock=tools_lock,
        self_tests=tuple(_text(test.script, path, "self_test.script") for test in recipe.self_test),
        copied=tuple(_read(Path(file.source), path, "files.source") for file in recipe.files),
        archive=Path(recipe.base.archive) if isinstance(recipe.base, ArchiveBase) else None,
        debian_lock=debian_lock,
    )


def checked_recipe(path: Path, roots: Sequence[Path] = ()) -> Recipe:
    """Return a recipe, and what it extends, without a look at the files that it names."""
    data = recipe_data(path, roots)
    return checked(data, Origin(path, roots, data))


def parse_recipe(text: str, name: str) -> Recipe:
    """Return the recipe in a TOML `text` that extends no other; `name` is how messages call it."""
    known = places(text, name)
    return checked(parse_toml(text, name), lambda location: known.find(location)[1])


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """Return what is in a TOML `text`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise not_toml(exc, name) from exc


# Tells where a key stands, as `recipe.toml:12:1`.
Where = Callable[[Location], str]


@dataclass(frozen=True)
class Origin:
    """Where the keys of a recipe stand that may extend another: in its own file, or in one below.

    Args:
        path: The recipe.
        roots: Folders of recipes that are extended by name.
        data: All of it, joined.
    """

    path: Path
    roots: Sequence[Path]
    data: Mapping[str, Any]

    def __call__(self, location: Location) -> str:
        """Return the place of a key: in the file that says most of it, the recipe's own before those below."""
        found = []
        # What is missing is missing in the recipe's own file.
        chain = _chain(self.path, self.roots) if location[0] in self.data else [self.path]
        for path in chain:
            text = _text(str(path), path, "recipe")
            own = same_location(location, self.data, parse_toml(text, path.name))
            found.append(places(text, path.name).find(own))
        return max(found, key=lambda each: each[0])[1]


def same_location(location: Location, data: Any, own: Any) -> Location:
    """Return where an item of joined lists is in one of the files: it has the same name, target or script. Pure."""
    result: list[str | int] = []
    for part in location:
        try:
            wanted = data[part]
        except (KeyError, IndexError, TypeError):
            wanted = None
        if isinstance(part, int) and isinstance(wanted, dict):
            same = (i for i, item in enumerate(own or ()) if _identity(item) == _identity(wanted))
            part = next(same, -1)
        result.append(part)
        data, own = wanted, _item(own, part)
    return tuple(result)


def _item(data: Any, part: str | int) -> Any:
    if isinstance(data, dict):
        return data.get(str(part))
    return data[part] if isinstance(data, list) and isinstance(part, int) and 0 <= part < len(data) else None


def _chain(path: Path, roots: Sequence[Path]) -> list[Path]:
    """Return a recipe and those that it extends, one above the other."""
    name = parse_toml(_text(str(path), path, "recipe"), path.name).get("extends")
    return [path, *(_chain(_extended(name, path, roots), roots) if isinstance(name, str) else ())]


def checked(data: Mapping[str, Any], where: Where) -> Recipe:
    """Return the recipe in `data`.

    Raises:
        SpecError: With every problem that can be seen.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as exc:
        lines = [f"{where(location)}: {message}" for row in exc.errors() for location, message in _problems(row)]
        raise SpecError("\n".join(lines)) from exc


def _problems(row: Mapping[str, Any]) -> list[tuple[Location, str]]:
    """Return one of pydantic's findings: several where parts do not go together."""
    unfit = (row.get("ctx") or {}).get("error")
    if isinstance(unfit, UnfitPartsError):
        return [(location, f"{'.'.join(map(str, location))}: {message}") for location, message in unfit.problems]
    return [(location_of(row), problem(row, Recipe))]


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


def check_locks(recipe: Recipe, lock: str, compile_lock: str, tools_lock: str, where: Where) -> None:
    """Raise `SpecError` where a lock has not the version that the recipe says, has no hash, or names an address."""
    packages, compiled = locked(lock), locked(compile_lock)
    pins: list[tuple[Location, str, str, dict[str, str]]] = []
    pins += [(("python", "pins", package), package, version, packages) for package, version in recipe.python.pins.items()]
    pins += [(("compile", "packages", i), p.name, p.version, compiled) for i, p in enumerate(recipe.compile.packages)]
    problems = [
        (key, f"{package} {version} was expected in the lock, it has {version_of(entries.get(package))}")
        for key, package, version, entries in pins
        if version_of(entries.get(package)) != version
    ]
    names = [package for package, _ in _entries(lock)]
    twice = sorted({package for package in names if names.count(package) > 1})
    problems += [(("python", "extra_locks"), f"{package} is in two locks") for package in twice]
    several = sorted(set(TENSORFLOW_NAMES) & {re.sub(r"[._]", "-", package) for package in names})
    if len(several) > 1:
        said = f"{' and '.join(several)} in the lock write the same files: one TensorFlow was expected"
        problems.append((("python", "lock"), said))
    texts = {("python", "lock"): lock, ("compile", "lock"): compile_lock, ("compile", "tools_lock"): tools_lock}
    problems += [(key, said) for key, text in texts.items() for said in _wrong_with_lock(text)]
    if problems:
        lines = [f"{where(key)}: {'.'.join(map(str, key[:2]))}: {said}" for key, said in problems]
        raise SpecError("\n".join(lines), "'hpcutils image lock' makes the locks from their .in files")


def _wrong_with_lock(text: str) -> list[str]:
    """Return what a lock must not have: an entry without a hash, an address, an option of pip's."""
    wrong = [f"{package}: no hash in the lock" for package, entry in locked(text).items() if HASH.search(entry) is None]
    plain = HASH.sub("", re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE))
    if re.search(r"://|(?:^|\s)-|\s@\s", plain, flags=re.MULTILINE):
        wrong.append("a lock holds names, versions and hashes; addresses and options belong in pip.conf")
    return wrong


def read_debian_lock(recipe: Recipe, path: Path) -> str:
    """Return the text of a recipe's Debian locks, one after the other; empty for one that names none."""
    named = [("system.lock", name) for name in (recipe.system.lock,) if name is not None]
    named += [("system.extra_locks", name) for name in recipe.system.extra_locks]
    return "".join(_ended(_text(name, path, key)) for key, name in named)


def check_debian_lock(recipe: Recipe, text: str, where: Where) -> None:
    """Raise `SpecError` where a Debian package that the recipe asks for is not locked: it would be another one next month."""
    hint = f"'hpcutils image lock {recipe.name}' makes the locks; a recipe that adds to another names its own in system.extra_locks"
    lock = parse_debian_lock(text, Path(recipe.system.lock or "system.lock").name)
    asked = {
        "base.packages": (recipe.base.packages, lock.base if isinstance(recipe.base, DebianBase) else lock.versions()),
        "system.packages": (recipe.system.packages, {**lock.base, **lock.image}),
        "compile.system_packages": (recipe.compile.system_packages, {**lock.base, **lock.compile}),
    }
    if recipe.system.lock is None and any(packages for packages, _ in asked.values()):
        said = "system.lock: this key is required: a file that says the version of every Debian package"
        raise SpecError(f"{where(('system', 'lock'))}: {said}", hint)
    problems = [
        f"{where(tuple(key.split('.')))}: {key}: {package} is not in the Debian lock"
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


def recipe_data(path: Path, roots: Sequence[Path] = (), chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return what a recipe says, file names made absolute, on top of what it extends."""
    if path.resolve() in chain:
        names = " → ".join(link.name for link in (*chain, path))
        raise SpecError(f"{path.name}:1:1: extends: recipes extend each other: {names}")
    data = own_data(path)
    name = data.pop("extends", None)
    if name is None:
        return data
    if not isinstance(name, str):
        raise SpecError(f"{_own_place(path)}: extends: the name or file of a recipe was expected, got {name!r}")
    file = _extended(name, path, roots)
    below = recipe_data(file, roots, (*chain, path.resolve()))
    # A recipe that is wrong by itself is told under its own name.
    checked(below, Origin(file, roots, below))
    # Two images of one name would take each other's place.
    del below["name"]
    if "base" in data:
        del below["base"]
    result: dict[str, Any] = joined(below, data)
    return result


def own_data(path: Path) -> dict[str, Any]:
    """Return what a recipe says itself, file names made absolute."""
    return _anchored(parse_toml(_text(str(path), path, "recipe"), path.name), path.parent)


def _own_place(path: Path) -> str:
    """Return where a recipe says what it extends."""
    return places(_text(str(path), path, "recipe"), path.name).find(("extends",))[1]


def _extended(name: str, path: Path, roots: Sequence[Path]) -> Path:
    if name.endswith(".toml"):
        return path.parent / name
    folders = [path.parent, *(root / "recipes" for root in roots)]
    found = next((file for folder in folders if (file := folder / f"{name}.toml").is_file()), None)
    if found is None:
        raise SpecError(f"{_own_place(path)}: extends: no recipe is called {name!r}", "give its name, or the path of its file")
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
    try:
        return _read(Path(name), recipe, key).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise SpecError(f"{recipe.name}: {key}: {name}: UTF-8 text was expected, byte {exc.start} is none") from exc


def _read(path: Path, recipe: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise SpecError(f"{recipe.name}: {key}: {path}: {exc.strerror}", "file names are relative to the recipe") from exc
