"""A YAML file as plain data plus the place (line and column) of every key and value in it.

The places are what makes an error message useful; pydantic alone knows only names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
        problems: What is wrong with the file whatever it should say: a key given twice, a value of no use.
    """

    name: str
    data: dict[str, Any]
    values: dict[Location, str] = field(default_factory=dict)
    keys: dict[Location, str] = field(default_factory=dict)
    overrides: dict[Location, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

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
        """Return one error that shows every problem once, in the order of the file."""
        # A value that could not be read needs no second sentence about its type.
        unread = {problem.location for problem in self.problems if not problem.at_key}
        told = [problem for problem in problems if problem in self.problems or problem.location not in unread]
        placed = sorted({(self.place(p), p.message) for p in told}, key=lambda row: (*_reading_order(row[0]), row[1]))
        lines = [f"{place}: {message}" for place, message in placed]
        return SpecError("\n".join(lines), f"nothing was submitted; mend {'this line' if len(lines) == 1 else 'these'}")

    def override(self, location: Location, value: Any, option: str) -> None:
        """Set a value from the command line: it wins over the file, and messages name the option.

        A section that is no mapping stays what it is, for the schema to report: an option sets one value, it mends nothing.
        """
        node: Any = self.data
        for name in location[:-1]:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                return
        node[location[-1]] = value
        self.overrides[location] = option


def _reading_order(place: str) -> tuple[int, int, str]:
    _, _, rest = place.partition(":")
    line, _, column = rest.partition(":")
    return (int(line), int(column), place) if line.isdigit() and column.isdigit() else (0, 0, place)
