"""Renewing a recipe's locks: every `.in` file beside a lock is resolved again, by uv, into versions and hashes."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpcutils.errors import ImageError, MissingPartError, SpecError
from hpcutils.fs import write_text
from hpcutils.image.caller import plain_environment
from hpcutils.image.debian import plan_debian_lock, run_debian_lock
from hpcutils.image.machine import Machine, network, pip_settings, without_addresses
from hpcutils.image.plan import find_recipe, recipe_roots
from hpcutils.shell import run
from hpcutils.specs.recipe import Recipe
from hpcutils.specs.recipe_file import checked_recipe, locked, own_data, version_of

RESOLVE_S = 600.0
# pip's settings by the variables that say the same to uv.
UV_VARIABLES = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "trusted-host": "UV_INSECURE_HOST"}


@dataclass(frozen=True)
class Resolution:
    """One lock to renew.

    Args:
        source: What is asked for, a `.in` file.
        lock: The lock beside it.
        constraints: Locks that it has to agree with.
        left_out: Packages that it must not list: they are in another lock, or compiled.
        compiled: Packages that are compiled from their sources; their dependencies are other locks' business.
    """

    source: Path
    lock: Path
    constraints: tuple[Path, ...]
    left_out: tuple[str, ...]
    compiled: tuple[str, ...] = ()

    def words(self, uv: str, target: Path, *, upgrade: bool) -> list[str]:
        """Return the command that writes the lock to `target`."""
        shape = ["--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
        words = [uv, "pip", "compile", "--quiet", "--python-version", "3.11", *shape]
        words += [word for path in self.constraints for word in ("--constraint", str(path))]
        words += [word for name in self.left_out for word in ("--no-emit-package", name)]
        words += ["--no-deps"] if self.compiled else []
        words += [word for name in self.compiled for word in ("--no-binary", name)]
        words += ["--upgrade"] if upgrade else []
        return [*words, str(self.source), "--output-file", str(target)]


@dataclass(frozen=True)
class Renewed:
    """What became of one lock.

    Args:
        lock: The file.
        changes: A line for each package: `name 1.0 → 1.1`.
    """

    lock: Path
    changes: tuple[str, ...]


def renew(name: str, machine: Machine, *, upgrade: bool) -> list[Renewed]:
    """Renew every lock that a recipe names itself: of Python's packages, and of Debian's.

    Raises:
        SpecError: No such recipe, or it has no lock that could be renewed.
        ImageError: What is asked for cannot be had together.
    """
    debian = plan_debian_lock(name)
    renewed = [run_lock(step, machine, upgrade=upgrade) for step in plan_lock(name, needed=debian is None)]
    return renewed + ([Renewed(debian.lock, run_debian_lock(debian, machine, upgrade=upgrade))] if debian is not None else [])


def plan_lock(name: str, *, needed: bool = True) -> tuple[Resolution, ...]:
    """Return how the locks that a recipe names itself are renewed, first to last: the later ones agree with the earlier.

    Those of a recipe that it extends are another's business. Locks that do not exist yet are made, so no lock is read here.

    Args:
        name: The recipe.
        needed: Whether there has to be one.

    Raises:
        SpecError: No such recipe, or no `.in` file beside any of its locks.
    """
    path = find_recipe(name)
    recipe = checked_recipe(path, recipe_roots())
    own = set(_words(own_data(path)))
    found = tuple(step for step in _resolutions(recipe) if str(step.lock) in own and step.source.is_file())
    if needed and not found:
        raise SpecError(f"{path.name}: no lock of it has a .in file beside it", "write what is wanted into NAME.in beside NAME.txt")
    return found


def _resolutions(recipe: Recipe) -> list[Resolution]:
    compiled, main, tools = (Path(name) for name in (recipe.compile.lock, recipe.python.lock, recipe.compile.tools_lock))
    extra = [Path(name) for name in recipe.python.extra_locks]
    by_hand = tuple(package.name for package in recipe.compile.packages)
    wanted = [
        Resolution(_source(compiled), compiled, (), (), by_hand),
        Resolution(_source(main), main, (_source(compiled),), by_hand),
        Resolution(_source(tools), tools, (main,), ()),
    ]
    for i, lock in enumerate(extra):
        below = (main, *extra[:i])
        listed = tuple(name for other in below if other.is_file() for name in locked(other.read_text(encoding="utf-8")))
        wanted.append(Resolution(_source(lock), lock, (*below, _source(compiled)), (*by_hand, *listed)))
    return wanted


def run_lock(resolution: Resolution, machine: Machine, *, upgrade: bool) -> Renewed:
    """Resolve one `.in` file again; without `upgrade` only what it asks for changes.

    Args:
        resolution: What is renewed.
        machine: How this machine reaches indexes of packages.
        upgrade: Take the newest versions of everything.

    Raises:
        MissingPartError: There is no uv.
        ImageError: What is asked for cannot be had together.
    """
    before = _entries(resolution.lock)
    step = replace(resolution, constraints=tuple(path for path in resolution.constraints if path.is_file()))
    with tempfile.TemporaryDirectory(prefix="hpcutils-lock-") as folder:
        target = Path(folder) / resolution.lock.name
        if resolution.lock.is_file():
            # uv keeps what the file has, where that is possible.
            shutil.copyfile(resolution.lock, target)
        words, environment = step.words(find_uv(), target, upgrade=upgrade), plain_environment(**uv_environment(machine))
        done = run(words, env=environment, check=False, timeout_s=RESOLVE_S)
        if done.returncode != 0:
            raise ImageError(f"{resolution.source}: {without_addresses(done.stderr.strip())}", "the old lock is still there")
        text, after = target.read_text(encoding="utf-8"), _entries(target)
    # A lock is for every machine: whoever installs from it says where from.
    if re.search(r"://|^--(?:index|extra|find)", text, re.MULTILINE):
        raise ImageError(f"{resolution.lock}: the lock would name an address", "say where packages come from in pip.conf")
    if after != before:
        head = f"# Made by 'hpcutils image lock' from {resolution.source.name}.\n"
        write_text(resolution.lock, head + "".join(after.values()))
    return Renewed(resolution.lock, _changes(before, after))


def uv_environment(machine: Machine) -> dict[str, str]:
    """Return pip's settings of this machine as the variables that uv, which does not read them, has for them. Pure but for reading.

    uv's own variables, where the user has set them, win.
    """
    settings = pip_settings(machine)
    given = {name: settings[key] for key, name in UV_VARIABLES.items() if settings.get(key)}
    if settings.get("proxy"):
        given |= {name: settings["proxy"] for name in ("HTTP_PROXY", "HTTPS_PROXY") if name.lower() not in machine.environ}
    # uv takes addresses and folders separated by commas here, pip by blanks.
    given |= {"UV_FIND_LINKS": ",".join(settings["find-links"].split())} if settings.get("find-links") else {}
    return network(machine) | {name: value for name, value in given.items() if name not in machine.environ}


def find_uv() -> str:
    """Return uv: on PATH, or beside this Python.

    Raises:
        MissingPartError: There is none.
    """
    beside = Path(sys.executable).parent / "uv"
    found = shutil.which("uv") or (str(beside) if beside.is_file() else None)
    if found is None:
        raise MissingPartError("locks are resolved by uv, which is not installed", "pip install uv")
    return found


def _words(value: Any) -> list[str]:
    """Return every text in plain data."""
    if isinstance(value, dict | list):
        return [word for item in (value.values() if isinstance(value, dict) else value) for word in _words(item)]
    return [value] if isinstance(value, str) else []


def _source(lock: Path) -> Path:
    return lock.with_suffix(".in")


def _entries(lock: Path) -> dict[str, str]:
    return locked(lock.read_text(encoding="utf-8")) if lock.is_file() else {}


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[str, ...]:
    names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    return tuple(f"{name} {version_of(before.get(name))} → {version_of(after.get(name))}" for name in names)
