"""Two images side by side: what went in, their packages, and their files one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from hpcutils.errors import ImageError
from hpcutils.image.caller import plain_environment
from hpcutils.image.exec_line import exec_argv
from hpcutils.image.find import Image, find_builder
from hpcutils.image.render import PYTHON
from hpcutils.shell import run

# What is asked of an image first, and what of the sidecars is no more than who built it, where, and how fast.
INPUTS = ("digest", "hpcutils", "python", "variant", "format", "layers")


@dataclass(frozen=True)
class Entry:
    """One file of an image.

    Args:
        kind: `-` a file, `d` a folder, `l` a link.
        mode: Its permissions, in octal.
        size_bytes: Its size; 0 for what is no file.
        date_s: Whole seconds since 1970.
        content: sha256 of a file, target of a link.
    """

    kind: str
    mode: str
    size_bytes: int
    date_s: int
    content: str


@dataclass(frozen=True)
class Difference:
    """How two images differ.

    Args:
        inputs: What went in: key → both values.
        packages: `kind name` → both versions; an empty one where it is not there.
        only_first: Files of the first alone.
        only_second: Files of the second alone.
        changed: Files of other content, kind or permissions.
        dates: Files of which nothing but the date differs.
    """

    inputs: Mapping[str, tuple[Any, Any]]
    packages: Mapping[str, tuple[str, str]]
    only_first: Sequence[str] = ()
    only_second: Sequence[str] = ()
    changed: Sequence[str] = ()
    dates: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {name: dict(value) if isinstance(value, Mapping) else list(value) for name, value in vars(self).items()}

    def lines(self) -> list[str]:
        """Return the difference for a person: everything but the files whose date alone differs, which are counted."""
        rows = [f"input    {key}: {_short(a)} → {_short(b)}" for key, (a, b) in self.inputs.items()]
        rows += [f"package  {name}: {a or 'none'} → {b or 'none'}" for name, (a, b) in self.packages.items()]
        rows += [f"-        {path}" for path in self.only_first]
        rows += [f"+        {path}" for path in self.only_second]
        rows += [f"changed  {path}" for path in self.changed]
        rows += [f"dates    {len(self.dates)} files differ in their date alone, {self.dates[0]} for one"] if self.dates else []
        return rows or ["no difference"]


def compare(first: Image, second: Image, *, with_files: bool) -> Difference:
    """Return how two images differ.

    Args:
        first: One image.
        second: The other.
        with_files: Also read every file of both, which takes some ten seconds each.
    """
    inputs = changes({key: first.sidecar.get(key) for key in INPUTS}, {key: second.sidecar.get(key) for key in INPUTS})
    packages = changes(_flat(first.sidecar), _flat(second.sidecar), missing="")
    trees = [parse_tree(ask(image, "tree")) for image in (first, second)] if with_files else [{}, {}]
    return difference(inputs, packages, *trees)


def changes(first: Mapping[str, Any], second: Mapping[str, Any], missing: Any = None) -> dict[str, tuple[Any, Any]]:
    """Return the keys of which the values differ, with both. Pure."""
    keys = sorted({*first, *second})
    both = {key: (first.get(key, missing), second.get(key, missing)) for key in keys}
    return {key: (a, b) for key, (a, b) in both.items() if a != b}


def difference(
    inputs: Mapping[str, tuple[Any, Any]],
    packages: Mapping[str, tuple[str, str]],
    first: Mapping[str, Entry],
    second: Mapping[str, Entry],
) -> Difference:
    """Return the difference of two trees, file by file. Pure."""
    both = sorted(set(first) & set(second))
    changed = [path for path in both if _without_date(first[path]) != _without_date(second[path])]
    dates = [path for path in both if path not in set(changed) and first[path].date_s != second[path].date_s]
    return Difference(inputs, packages, sorted(set(first) - set(second)), sorted(set(second) - set(first)), changed, dates)


def parse_tree(output: str) -> dict[str, Entry]:
    """Return the files that `inside.py tree` printed."""
    rows = [json.loads(line) for line in output.splitlines()]
    return {path: Entry(*values) for path, *values in rows}


def ask(image: Image, command: str) -> str:
    """Run one command of `inside.py` in an image and return what it printed.

    Raises:
        ImageError: The image cannot be entered, or has no Python.
    """
    if image.path.suffix != ".sif":
        raise ImageError(f"{image.path}: only the files of a SIF can be looked at", "apptainer build image.sif oci-archive:…")
    script = files("hpcutils.image").joinpath("inside.py").read_text(encoding="utf-8")
    words = [*exec_argv(image.path, program=find_builder()), PYTHON, "-", command]
    return run(words, input=script, env=plain_environment(), error=ImageError).stdout


def _flat(sidecar: Mapping[str, Any]) -> dict[str, str]:
    packages = sidecar.get("packages") or {}
    return {f"{kind} {name}": version for kind, found in packages.items() for name, version in found.items()}


def _without_date(entry: Entry) -> tuple[str, str, int, str]:
    return entry.kind, entry.mode, entry.size_bytes, entry.content


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 70 else f"{text[:67]}..."
