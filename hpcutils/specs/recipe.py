"""A recipe: what goes into a container image, as a person writes it in `containers/recipes/*.toml`.

`read_recipe` gives the typed recipe together with the contents of every file that it names, so that whatever follows
(rendering, digest, build) needs no further look at the disk and no path.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from hpcutils.errors import SpecError

# Text that is pasted into a build script: names only, nothing that a shell reads.
PackageName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+.:_-]*$")]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Version = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)*$")]
OneLine = Annotated[str, StringConstraints(pattern=r"^[^\n\r]*$")]
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/[A-Za-z0-9._/+-]+$")]

TENSORFLOW_NAMES = ("tensorflow", "tensorflow-cpu", "tensorflow-rocm")
# Horovod 0.28.1 compiles against TensorFlow 2.15 to 2.18: later ones no longer ship headers that it includes.
HOROVOD_NEWEST_TENSORFLOW = {"0.28.1": (2, 18)}


class Closed(BaseModel):
    """Frozen; a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(Closed):
    """The distribution that everything stands on, bootstrapped from its packages.

    Args:
        suite: Debian's name of the release.
        packages: Packages beside the smallest set that apt works with.
        epoch: Date, in seconds since 1970, of what has no date of its own.
        sha256: Digest that the bootstrapped archive must have; `None` accepts what the mirror has today.
    """

    suite: Literal["bookworm"]
    packages: tuple[PackageName, ...]
    epoch: int = Field(ge=0)
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None


class System(Closed):
    """Debian packages that stay in the image."""

    packages: tuple[PackageName, ...] = ()


class Python(Closed):
    """Python packages installed from wheels, every file known by its hash."""

    version: Literal["3.11"]
    lock: str
    pins: dict[PackageName, Version] = Field(default_factory=dict)


class CompiledPackage(Closed):
    """A package compiled for this image.

    Args:
        name: Its name in the lock.
        version: Its version in the lock.
        built_against: Locked packages whose version the result depends on.
        environment: Variables of its build.
    """

    name: PackageName
    version: Version
    built_against: tuple[PackageName, ...] = ()
    environment: dict[VariableName, OneLine] = Field(default_factory=dict)


class Compile(Closed):
    """The stage that compiles; none of its packages and tools stay in the image."""

    system_packages: tuple[PackageName, ...] = ()
    tools_lock: str
    lock: str
    packages: tuple[CompiledPackage, ...] = ()


class CopiedFile(Closed):
    """A file that is copied into the image."""

    source: str
    target: AbsolutePath
    mode: Annotated[str, StringConstraints(pattern=r"^0[0-7]{3}$")] = "0644"


class SelfTest(Closed):
    """A Python script that runs in the finished image and prints one JSON object a check."""

    script: str


class Recipe(Closed):
    """A whole recipe. File names in it are relative to its own file."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    summary: OneLine
    variant: Literal["cpu", "cuda", "rocm"]
    base: Base
    system: System = System()
    python: Python
    compile: Compile
    environment: dict[VariableName, OneLine] = Field(default_factory=dict)
    labels: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+$")], OneLine] = Field(default_factory=dict)
    files: tuple[CopiedFile, ...] = ()
    self_test: SelfTest

    @model_validator(mode="after")
    def _horovod_fits_tensorflow(self) -> Recipe:
        horovod = next((p.version for p in self.compile.packages if p.name == "horovod"), None)
        newest = HOROVOD_NEWEST_TENSORFLOW.get(horovod or "")
        for name in TENSORFLOW_NAMES:
            given = self.python.pins.get(name)
            if newest is not None and given is not None and _numbers(given)[:2] > newest:
                raise ValueError(
                    f"{name} {given} with horovod {horovod}: TensorFlow 2.19 and later no longer ship the LLVM and XLA headers "
                    f"that Horovod {horovod} includes; the newest that it compiles against is "
                    f"{'.'.join(map(str, newest))}"
                )
        if horovod is not None and not any(name in self.python.pins for name in TENSORFLOW_NAMES):
            raise ValueError("horovod is compiled against TensorFlow: give TensorFlow's version in python.pins")
        return self


@dataclass(frozen=True)
class RecipeFiles:
    """A recipe and the contents of every file that it names.

    Args:
        recipe: What was written.
        lock: Text of `python.lock`.
        compile_lock: Text of `compile.lock`.
        tools_lock: Text of `compile.tools_lock`.
        self_test: Text of the self-test.
        copied: Content of each of `recipe.files`, in their order.
    """

    recipe: Recipe
    lock: str
    compile_lock: str
    tools_lock: str
    self_test: str
    copied: tuple[bytes, ...] = field(default=())


def read_recipe(path: Path) -> RecipeFiles:
    """Read a recipe and all that it names.

    Raises:
        SpecError: Not TOML, an unknown key, a wrong value, a missing file, a lock that disagrees with the recipe, or
            packages that do not go together. Every problem is a line `file: key: what is wrong`.
    """
    recipe = parse_recipe(_read(path, path, "recipe").decode("utf-8", "replace"), path.name)
    folder = path.parent
    text = {
        key: _read(folder / name, path, key).decode("utf-8", "replace")
        for key, name in {
            "python.lock": recipe.python.lock,
            "compile.lock": recipe.compile.lock,
            "compile.tools_lock": recipe.compile.tools_lock,
            "self_test.script": recipe.self_test.script,
        }.items()
    }
    check_locks(recipe, text["python.lock"], text["compile.lock"], path.name)
    return RecipeFiles(
        recipe,
        lock=text["python.lock"],
        compile_lock=text["compile.lock"],
        tools_lock=text["compile.tools_lock"],
        self_test=text["self_test.script"],
        copied=tuple(_read(folder / file.source, path, "files.source") for file in recipe.files),
    )


def parse_recipe(text: str, name: str) -> Recipe:
    """Return the recipe in a TOML `text`; `name` is how messages call it."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise SpecError(f"{name}: not valid TOML: {exc}") from exc
    try:
        return Recipe.model_validate(data)
    except ValidationError as exc:
        raise SpecError("\n".join(f"{name}: {_problem(row)}" for row in exc.errors())) from exc


def locked(lock: str) -> dict[str, str]:
    """Return the entries of a lock: name of the package → its whole requirement, hashes included."""
    entries = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)[1:]
    return {entry.partition("==")[0].strip().lower(): entry.rstrip() + "\n" for entry in entries}


def check_locks(recipe: Recipe, lock: str, compile_lock: str, name: str) -> None:
    """Raise `SpecError` where a lock has not the version that the recipe says, has no hash, or names an address."""
    wanted = [("python.pins", package, version, locked(lock)) for package, version in recipe.python.pins.items()]
    wanted += [("compile.packages", p.name, p.version, locked(compile_lock)) for p in recipe.compile.packages]
    problems = [
        f"{name}: {key}: {package} {version} was expected in the lock, it has {_version(entries.get(package))}"
        for key, package, version, entries in wanted
        if _version(entries.get(package)) != version
    ]
    for text in (lock, compile_lock):
        bare = [package for package, entry in locked(text).items() if "--hash=" not in entry]
        problems += [f"{name}: {package}: no hash in the lock" for package in bare]
        if re.search(r"://|^\s*-", re.sub(r"^\s+--hash=.*$", "", text, flags=re.MULTILINE), flags=re.MULTILINE):
            problems.append(f"{name}: a lock holds names, versions and hashes; addresses and options belong in pip.conf")
    if problems:
        raise SpecError("\n".join(problems), "containers/locks/renew makes the locks from their .in files")


def _version(entry: str | None) -> str:
    match = re.match(r"[^=]+==\s*([^\s;\\]+)", entry or "")
    return "none" if match is None else match.group(1)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _read(path: Path, recipe: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise SpecError(f"{recipe.name}: {key}: {path}: {exc.strerror}", "file names are relative to the recipe") from exc


def _problem(row: Mapping[str, Any]) -> str:
    """One line for one of pydantic's findings: the key, and what is wrong with it."""
    location = [part for part in row["loc"] if part != "[key]"]
    key = ".".join(str(part) for part in location) or "recipe"
    if row["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _keys(location), n=1)
        return f"{key}: unknown key" + (f"; did you mean '{near[0]}'?" if near else "")
    if row["type"] == "missing":
        return f"{key}: this key is required"
    message = str(row["msg"]).removeprefix("Value error, ")
    return f"{key}: {message}" + ("" if row["type"] == "value_error" else f"; got {row['input']!r}")


def _keys(location: list[Any]) -> list[str]:
    """Return the keys that are known beside the last one of `location`."""
    model: Any = Recipe
    for part in location[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            # tuple[CompiledPackage, ...] hides the model among its arguments.
            inner = (annotation, *getattr(annotation, "__args__", ()))
            model = next((candidate for candidate in inner if hasattr(candidate, "model_fields")), model)
    return list(model.model_fields)
