"""The Debian lock of a recipe: each package that apt installs, by name and exact version.

A lock is plain text, `name=version` a line, under three heads:

    [base]       what the base has: bootstrapped, or found in an image that the recipe stands on
    [compile]    what the stage that compiles adds to it
    [image]      what the finished image adds to it

It names no mirror: whoever builds says where packages come from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from hpcutils.errors import SpecError

HEADS = ("base", "compile", "image")
# Names and versions as Debian's policy has them; a name can end in its architecture.
LINE = re.compile(r"^([a-z0-9][a-z0-9+.-]+(?::[a-z0-9-]+)?)=([A-Za-z0-9.+:~-]+)$")
NO_VERSION = "none"

Versions = Mapping[str, str]


@dataclass(frozen=True)
class DebianLock:
    """A lock: version by name of each package, under each head."""

    base: Versions = field(default_factory=dict)
    compile: Versions = field(default_factory=dict)
    image: Versions = field(default_factory=dict)

    def section(self, head: str) -> Versions:
        """Return the packages under one of `HEADS`."""
        found: Versions = getattr(self, head)
        return found

    def versions(self) -> dict[str, str]:
        """Return all packages; a lock has one version of each."""
        return {**self.base, **self.compile, **self.image}

    def text(self, head: str = "") -> str:
        """Return the lock as it is written, or the lines under one head alone."""
        if head:
            return "".join(f"{name}={version}\n" for name, version in sorted(self.section(head).items()))
        return "\n".join(f"[{each}]\n{self.text(each)}" for each in HEADS if self.section(each))

    def without(self, below: DebianLock) -> DebianLock:
        """Return what this lock has and `below` has not: the lock of a recipe that only adds to another."""
        return DebianLock(*({n: v for n, v in self.section(head).items() if n not in below.section(head)} for head in HEADS))


def parse_debian_lock(text: str, name: str) -> DebianLock:
    """Return the lock in `text`; one that follows another (a recipe that adds to the one below) joins it.

    Args:
        text: One lock, or several in a row.
        name: How messages call it.

    Raises:
        SpecError: A line is no package with a version, stands under no head, or a package has two versions.
    """
    sections: dict[str, dict[str, str]] = {head: {} for head in HEADS}
    problems, head = [], ""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            head = line[1:-1] if line.startswith("[") and line.endswith("]") else head
            problems += [] if line == f"[{head}]" and head in HEADS else _taken(line, sections.get(head), f"{name}:{number}")
    problems += [f"{name}: {package} has two versions: {' and '.join(found)}" for package, found in _several(sections).items()]
    if problems:
        raise SpecError("\n".join(problems), "'hpcutils image lock' makes the lock")
    return DebianLock(**sections)


def changes(before: DebianLock, after: DebianLock) -> tuple[str, ...]:
    """Return a line for each package that another version, or none, was locked of: `name 1.0 → 1.1`."""
    old, new = before.versions(), after.versions()
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return tuple(f"{name} {old.get(name, NO_VERSION)} → {new.get(name, NO_VERSION)}" for name in names)


def _taken(line: str, section: dict[str, str] | None, where: str) -> list[str]:
    """Take one line into its section; return what is wrong with it."""
    found = LINE.match(line)
    if found is None or section is None:
        return [f"{where}: name=version under one of {', '.join(f'[{head}]' for head in HEADS)} was expected, got {line!r}"]
    package, version = found.groups()
    if section.setdefault(package, version) != version:
        return [f"{where}: {package} has two versions: {section[package]} and {version}"]
    return []


def _several(sections: Mapping[str, Versions]) -> dict[str, list[str]]:
    """Return the packages that have another version under another head."""
    found: dict[str, set[str]] = {}
    for section in sections.values():
        for name, version in section.items():
            found.setdefault(name, set()).add(version)
    return {name: sorted(versions) for name, versions in found.items() if len(versions) > 1}
