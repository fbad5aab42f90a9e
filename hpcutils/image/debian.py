"""Making a recipe's Debian lock, and holding it against what this machine's mirrors have now.

A mirror keeps the versions of now alone. A lock says which ones an image has; whether they can still be had is told before a
build starts, package by package.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpcutils.errors import ImageError, SpecError
from hpcutils.fs import write_text
from hpcutils.image.apt import MINIMAL, Index, installed_versions, open_index
from hpcutils.image.caller import plain_environment
from hpcutils.image.find import find_builder
from hpcutils.image.machine import Machine, network
from hpcutils.image.plan import find_recipe, recipe_roots
from hpcutils.shell import run
from hpcutils.specs.debian import NO_VERSION, DebianLock, changes, parse_debian_lock
from hpcutils.specs.recipe import DebianBase, ImageBase, Recipe
from hpcutils.specs.recipe_file import checked_recipe, own_data

SHOWN = 20


@dataclass(frozen=True)
class DebianStep:
    """One Debian lock to renew.

    Args:
        recipe: Whose lock it is.
        lock: The file.
        below: Locks of the recipe that this one extends: what they have is not repeated.
    """

    recipe: Recipe
    lock: Path
    below: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Missing:
    """A locked package that cannot be had any more.

    Args:
        name: The package.
        locked: Its version in the lock.
        available: The newest version that there is; empty where there is none.
    """

    name: str
    locked: str
    available: str

    def describe(self) -> str:
        """Return it in one line."""
        return f"  {self.name}: locked {self.locked}, available {self.available or NO_VERSION}"


@contextmanager
def index_of(machine: Machine, suite: str) -> Iterator[Index]:
    """Yield the packages of a suite as this machine's mirrors have them now."""
    with tempfile.TemporaryDirectory(prefix="hpcutils-apt-", dir=machine.temporary()) as folder:
        yield open_index(Path(folder), machine, suite)


def missing(index: Index, versions: Mapping[str, str]) -> tuple[Missing, ...]:
    """Return which of these packages cannot be had in their versions."""
    available = index.available(versions)
    gone = (name for name, version in sorted(versions.items()) if version not in available.get(name, ()))
    return tuple(Missing(name, versions[name], next(iter(available.get(name, ())), "")) for name in gone)


def check_available(name: str, gone: Sequence[Missing]) -> None:
    """Refuse to build what cannot be built any more.

    Raises:
        ImageError: A locked package is gone; the message has each, with its version and the one that there is.
    """
    if not gone:
        return
    more = [f"  and {len(gone) - SHOWN} more"] if len(gone) > SHOWN else []
    lines = [f"{name}: this machine's Debian mirrors no longer have what is locked:", *(each.describe() for each in gone[:SHOWN])]
    raise ImageError(
        "\n".join([*lines, *more]),
        f"'hpcutils image lock {name}' renews the lock; 'hpcutils build {name} --relock' takes what there is, for this machine; "
        "build.apt_sources in site.toml can name a snapshot that keeps old versions",
    )


def resolve(recipe: Recipe, index: Index, keep: Mapping[str, str], machine: Machine) -> DebianLock:
    """Return the version of each Debian package of a recipe.

    Args:
        recipe: What is asked for.
        index: What there is.
        keep: Versions to stay with, where they can be had.
        machine: How a registry is reached, where the base is an image.

    Raises:
        ImageError: The packages cannot be had together.
    """
    gone = {each.name for each in missing(index, keep)} if keep else set()
    kept = {name: version for name, version in keep.items() if name not in gone}
    if isinstance(recipe.base, DebianBase):
        base = index.installs((*MINIMAL, *recipe.base.packages), "", kept)
        status = index.status(base)
    else:
        status = _status_of_image(recipe, machine)
        base = installed_versions(status)
    lacking = () if isinstance(recipe.base, DebianBase) else recipe.base.packages
    compiling = index.installs((*lacking, *recipe.compile.system_packages), status, kept)
    return DebianLock(base, compiling, index.installs((*lacking, *recipe.system.packages), status, kept))


def _status_of_image(recipe: Recipe, machine: Machine) -> str:
    """Return dpkg's status of a base that is an image already."""
    base = recipe.base
    assert not isinstance(base, DebianBase)
    address = f"docker://{base.image}" if isinstance(base, ImageBase) else f"oci-archive:{base.archive}"
    with tempfile.TemporaryDirectory(prefix="hpcutils-base-", dir=machine.temporary()) as folder:
        environment = plain_environment(**network(machine), APPTAINER_TMPDIR=folder, APPTAINER_CACHEDIR=f"{folder}/cache")
        words = [find_builder(), "--quiet", "exec", "--no-home", address, "cat", "/var/lib/dpkg/status"]
        return run(words, env=environment, error=ImageError).stdout


def plan_debian_lock(name: str) -> DebianStep | None:
    """Return how the Debian lock that a recipe names itself is renewed; `None` for a recipe that names none.

    Raises:
        SpecError: No such recipe, or it is not right.
    """
    path = find_recipe(name)
    recipe = checked_recipe(path, recipe_roots())
    system = own_data(path).get("system", {})
    own = [*([system["lock"]] if "lock" in system else []), *system.get("extra_locks", [])]
    named = [*([recipe.system.lock] if recipe.system.lock else []), *recipe.system.extra_locks]
    if len(own) > 1:
        raise SpecError(f"{path.name}: system: one Debian lock of its own was expected, it names {len(own)}")
    if not own:
        return None
    return DebianStep(recipe, Path(own[0]), tuple(Path(each) for each in named[: named.index(own[0])]))


def run_debian_lock(step: DebianStep, machine: Machine, *, upgrade: bool) -> tuple[str, ...]:
    """Resolve a recipe's Debian packages again, write its lock, and return what changed.

    Args:
        step: What is renewed.
        machine: How this machine reaches mirrors.
        upgrade: Take the newest versions; without it, only what can no longer be had, or was not locked, is new.

    Raises:
        ImageError: The packages cannot be had together.
        MissingPartError: There is no apt on this machine.
    """
    below = parse_debian_lock("".join(path.read_text(encoding="utf-8") for path in step.below), "system.lock")
    before = parse_debian_lock(step.lock.read_text(encoding="utf-8"), step.lock.name) if step.lock.is_file() else DebianLock()
    keep = {**({} if upgrade else before.versions()), **below.versions()}
    with index_of(machine, step.recipe.base.suite) as index:
        after = resolve(step.recipe, index, keep, machine).without(below)
    if after != before:
        head = f"# Made by 'hpcutils image lock': Debian {step.recipe.base.suite}, {architecture()}.\n"
        write_text(step.lock, head + after.text())
    return changes(before, after)


def architecture() -> str:
    """Return Debian's name of this machine's architecture: rebuilt packages have versions of their own on each."""
    return run(["dpkg", "--print-architecture"], error=ImageError).stdout.strip()
