"""A YAML file as plain data plus the place (line and column) of every key and value in it.

The places are what makes an error message useful; pydantic alone knows only names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcutils.errors import SpecError

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it is, and what was expected there."""

    location: Location
    message: str
    at_key: bool = False


@dataclass(frozen=True)
class Source:
    """What a person wrote.

    Args:
        name: How messages call the file.
        data: Plain dicts, lists and scalars.
        values: Place of every value as `line:column`, both from 1.
        keys: Place of every key.
        overrides: Locations that came from the command line, with the option that set them.
    """

    name: str
    data: dict[str, Any]
    values: dict[Location, str] = field(default_factory=dict)
    keys: dict[Location, str] = field(default_factory=dict)
    overrides: dict[Location, str] = field(default_factory=dict)

    def place(self, problem: Problem) -> str:
        """Return `train.yaml:12:5`, or the name of the option that set the value."""
        for end in range(len(problem.location), 0, -1):
            location = problem.location[:end]
            if location in self.overrides:
                return self.overrides[location]
            known = self.keys if problem.at_key or end < len(problem.location) else self.values
            if location in known:
                return f"{self.name}:{known[location]}"
        return f"{self.name}:1:1"

    def error(self, problems: Sequence[Problem]) -> SpecError:
        """Return one error that shows every problem, in the order of the file."""
        placed = sorted(((self.place(p), p.message) for p in problems), key=lambda row: _reading_order(row[0]))
        lines = [f"{place}: {message}" for place, message in placed]
        return SpecError("\n".join(lines), f"nothing was submitted; mend {'this line' if len(lines) == 1 else 'these'}")

    def override(self, location: Location, value: Any, option: str) -> None:
        """Set a value from the command line: it wins over the file, and messages name the option."""
        node: dict[Any, Any] = self.data
        for name in location[:-1]:
            if not isinstance(node.get(name), dict):
                node[name] = {}
            node = node[name]
        node[location[-1]] = value
        self.overrides[location] = option


def _reading_order(place: str) -> tuple[int, int, str]:
    _, _, rest = place.partition(":")
    line, _, column = rest.partition(":")
    return (int(line), int(column), place) if line.isdigit() and column.isdigit() else (0, 0, place)


def read_yaml(path: Path) -> Source:
    """Read a YAML 1.2 mapping with the place of everything in it.

    Raises:
        SpecError: No such file, not YAML, not a mapping, or a key given twice.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SpecError(f"{path}: cannot be read: {exc}", "give the path of a train.yaml") from exc
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
    except MarkedYAMLError as exc:
        mark = exc.problem_mark
        where = f"{mark.line + 1}:{mark.column + 1}" if mark is not None else "1:1"
        raise SpecError(f"{path.name}:{where}: not valid YAML: {exc.problem}") from exc
    source = Source(path.name, {})
    problems: list[Problem] = []
    data = _plain(root, (), source, problems, yaml) if root is not None else None
    if not isinstance(data, dict):
        raise SpecError(f"{path.name}:1:1: a mapping of keys to values was expected", "start from jobs/digits/train.yaml")
    if problems:
        raise source.error(problems)
    source.data.update(data)
    return source


def _plain(node: Any, location: Location, source: Source, problems: list[Problem], yaml: Any) -> Any:
    """Turn a composed node into plain data, noting places on the way down."""
    source.values[location] = _mark(node)
    if node.id == "sequence":
        return [_plain(item, (*location, i), source, problems, yaml) for i, item in enumerate(node.value)]
    if node.id != "mapping":
        return yaml.constructor.construct_object(node)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        here = (*location, key)
        if key in result:
            problems.append(Problem(here, f"key {key!r} is given twice", at_key=True))
        source.keys[here] = _mark(key_node)
        result[key] = _plain(value_node, here, source, problems, yaml)
    return result


def _mark(node: Any) -> str:
    return f"{node.start_mark.line + 1}:{node.start_mark.column + 1}"
