"""From pydantic's findings in a TOML file to lines for a person. Apart from the recipes: site.toml is read by every submission."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from hpcutils.specs.toml_places import Location

# The kinds of `base` in a recipe: pydantic puts them into locations.
BASE_TAGS = ("debian", "image", "archive")


def problem(row: Mapping[str, Any], root: type[BaseModel]) -> str:
    """Return one line for one of pydantic's findings in a `root`: the key, and what is wrong with it."""
    location = location_of(row)
    key = ".".join(str(part) for part in location) or "recipe"
    if row["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _keys(root, row["loc"][:-1]), n=1)
        return f"{key}: unknown key" + (f"; did you mean '{near[0]}'?" if near else "")
    if row["type"] == "missing":
        return f"{key}: this key is required"
    message = str(row["msg"]).removeprefix("Value error, ")
    return f"{key}: {message}" + ("" if row["type"] == "value_error" else f"; got {row['input']!r}")


def location_of(row: Mapping[str, Any]) -> Location:
    """Return the key that one of pydantic's findings is about."""
    return tuple(part for i, part in enumerate(row["loc"]) if part != "[key]" and not (i == 1 and part in BASE_TAGS))


def _keys(model: Any, location: Sequence[Any]) -> list[str]:
    """Return the keys that are known in the table at `location`."""
    extra = ["extends"] if not location else []
    models: list[Any] = []
    for part in location:
        if not isinstance(part, str):
            continue
        if part in model.model_fields:
            models = _models(model.model_fields[part].annotation)
            model = models[0] if models else model
        elif part in BASE_TAGS:
            model = models[BASE_TAGS.index(part)]
    return [*model.model_fields, *extra]


def _models(annotation: Any) -> list[Any]:
    """Return the models in an annotation: tuple[CompiledPackage, ...] and unions hide them among their arguments."""
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
