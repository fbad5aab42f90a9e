"""From pydantic's findings to sentences: what was expected, what was given, and the nearest key that is known."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from hpcutils.specs.source import Location, Problem

# What pydantic adds to a location to say which branch of `str | dict` it tried.
UNION_BRANCHES = ("str", "dict[str,any]")
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than": "less than {lt}",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "text of the form {pattern}",
}


def problems_of(rows: Sequence[Mapping[str, Any]], root: type[BaseModel]) -> list[Problem]:
    """Translate pydantic's findings into places and sentences: one for each place, whatever alternatives there were.

    Args:
        rows: `ValidationError.errors()`.
        root: The model that was validated.
    """
    places: dict[Location, list[Mapping[str, Any]]] = {}
    for row in rows:
        location = tuple(part for part in row["loc"] if part not in UNION_BRANCHES)
        places.setdefault(location, []).append(row)
    return [problem for location, found in places.items() for problem in _problems_at(location, found, root)]


def _problems_at(location: Location, rows: Sequence[Mapping[str, Any]], root: type[BaseModel]) -> Iterator[Problem]:
    plain = [row for row in rows if row["type"] in EXPECTED]
    if plain:
        # One value that fits no branch of a union has one finding a branch.
        expected = " or ".join(dict.fromkeys(EXPECTED[row["type"]].format(**row.get("ctx", {})) for row in plain))
        yield Problem(location, f"{_dotted(location)}: {expected} was expected, got {_short(plain[0].get('input'))}")
    for row in (row for row in rows if row["type"] not in EXPECTED):
        yield _problem(location, row, root)


def _problem(location: Location, row: Mapping[str, Any], root: type[BaseModel]) -> Problem:
    if row["type"] == "extra_forbidden":
        return Problem(location, _unknown_key(location, root), at_key=True)
    if row["type"] == "missing":
        return Problem(location[:-1] or location, f"key {location[-1]!r} is missing", at_key=True)
    if row["type"] == "value_error":
        return Problem(location, f"{_dotted(location)}: {row['ctx']['error']}")
    return Problem(location, f"{_dotted(location)}: {row['msg']}, got {_short(row.get('input'))}")


def _unknown_key(location: Location, root: type[BaseModel]) -> str:
    known = list(_model_at(location[:-1], root).model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {location[-1]!r}; {advice}"


def _model_at(location: Location, root: type[BaseModel]) -> type[BaseModel]:
    """Return the model that a location lies in."""
    for name in (part for part in location if isinstance(part, str)):
        root = next(_models_in(root.model_fields[name].annotation))
    return root


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location) or "the file"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
