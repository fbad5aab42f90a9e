"""Where keys stand in a TOML text: what makes a message useful, and what `tomllib` does not tell.

Keys at the start of a line and heads of tables are found; what is inside of an inline table or an array has the place of its key.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hpcutils.errors import SpecError

Location = tuple[str | int, ...]

PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
DOTTED = rf"{PART}(?:\s*\.\s*{PART})*"
KEY = re.compile(rf"\s*({DOTTED})\s*=")
HEAD = re.compile(rf"\s*(\[\[?)\s*({DOTTED})\s*\]")
# Strings and comments: what is in them is no bracket.
TEXTS = re.compile(r"""\"{3}.*?\"{3}|'{3}.*?'{3}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|#[^\n]*""", re.DOTALL)


@dataclass(frozen=True)
class Places:
    """Where the keys of one file are.

    Args:
        name: How messages call the file.
        keys: Line and column, both from 1, of each key and each head of a table.
    """

    name: str
    keys: Mapping[Location, tuple[int, int]] = field(default_factory=dict)

    def find(self, location: Sequence[str | int]) -> tuple[int, str]:
        """Return how much of `location` is known, and the place of that: `recipe.toml:12:1`."""
        for length in range(len(location), 0, -1):
            if tuple(location[:length]) in self.keys:
                line, column = self.keys[tuple(location[:length])]
                return length, f"{self.name}:{line}:{column}"
        return 0, f"{self.name}:1:1"


def places(text: str, name: str) -> Places:
    """Return where the keys of a valid TOML `text` are."""
    keys: dict[Location, tuple[int, int]] = {}
    counts: dict[Location, int] = {}
    table: Location = ()
    for number, line in _starts(text):
        head, key = HEAD.match(line), KEY.match(line)
        if head is not None:
            table = _resolved(_parts(head[2]), counts, new=head[1] == "[[")
            keys[table] = (number, head.start(1) + 1)
        elif key is not None:
            parts = _parts(key[1])
            for length in range(1, len(parts) + 1):
                keys.setdefault((*table, *parts[:length]), (number, key.start(1) + 1))
    return Places(name, keys)


def not_toml(error: tomllib.TOMLDecodeError, name: str) -> SpecError:
    """Return the error of a text that is no TOML, with its place in front."""
    found = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
    what = str(error)[: found.start()] if found is not None else str(error)
    return SpecError(f"{name}:{':'.join(found.groups()) if found is not None else '1:1'}: not valid TOML: {what}")


def _starts(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that start a key or a table: not those inside of an array or of a text of several lines."""
    plain = TEXTS.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    depth = 0
    inside = _inside_of_texts(text)
    for number, (line, bare) in enumerate(zip(text.split("\n"), plain.split("\n"), strict=True), start=1):
        if depth == 0 and number not in inside:
            yield number, line
        value = "" if depth == 0 and HEAD.match(line) else bare
        depth += sum(value.count(mark) for mark in "[{") - sum(value.count(mark) for mark in "]}")


def _inside_of_texts(text: str) -> set[int]:
    """Return the numbers of lines that a text of several lines goes on in."""
    found = set()
    for match in TEXTS.finditer(text):
        first = text.count("\n", 0, match.start()) + 1
        found |= set(range(first + 1, first + match[0].count("\n") + 1))
    return found


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part if part[0] not in "\"'" else part[1:-1] for part in re.findall(PART, dotted))


def _resolved(parts: tuple[str, ...], counts: dict[Location, int], *, new: bool) -> Location:
    """Return the location of a table: the last item, or a new one, of each array of tables on the way."""
    location: Location = ()
    for i, part in enumerate(parts):
        location = (*location, part)
        last = i == len(parts) - 1
        if last and new:
            counts[location] = counts.get(location, -1) + 1
        if location in counts and (not last or new):
            location = (*location, counts[location])
    return location
