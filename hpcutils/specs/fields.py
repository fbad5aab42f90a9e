"""What the sections of `train.yaml` have in common: their base class, and the checks of paths and functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, ValidationInfo, model_validator
from pydantic_core import InitErrorDetails

from hpcutils.specs.code import why_left_out

FUNCTION_PATTERN = r"^(?P<file>[^:]+\.py):(?P<function>[A-Za-z_]\w*)$"
Contradiction = tuple[tuple[str, ...], str]


class Model(BaseModel):
    """Common settings: frozen, closed, strict enough that `"3"` is not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterable[Contradiction]:
        """Yield what does not go together, each with the key it is said of (none: the section).

        Args:
            given: The section as it was written: nothing in it has been checked.
        """
        return ()

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, value: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        """Report contradictions beside wrong values: pydantic's own `after` is not called when a value is wrong."""
        found = list(cls.contradictions(value)) if isinstance(value, Mapping) else []
        rows: list[InitErrorDetails] = [
            {"type": "value_error", "loc": key, "input": value, "ctx": {"error": ValueError(said)}} for key, said in found
        ]
        try:
            made = handler(value)
        except ValidationError as exc:
            raise ValidationError.from_exception_data(cls.__name__, [*exc.errors(include_url=False), *rows]) from exc  # type: ignore[list-item]
        if rows:
            raise ValidationError.from_exception_data(cls.__name__, rows)
        return made


def base_folder(info: ValidationInfo) -> Path | None:
    """Return the folder that relative paths start from; `None` when a resolved job is read back."""
    return (info.context or {}).get("base")


def check_file(
    value: str, info: ValidationInfo, remark: str = "looked in the folder of the job file", may_be_missing: bool = False
) -> str:
    """Check that a path, relative to the job's folder, is a file, or one that can be made.

    Raises:
        ValueError: It is none, or no name that a file can have.
    """
    base = base_folder(info)
    try:
        missing = base is not None and not (base / value).is_file()
    except OSError as exc:
        raise ValueError(f"not a path: {exc.strerror}") from exc
    if missing and not may_be_missing:
        raise ValueError(f"no such file: {value} ({remark})")
    return value


def check_function(value: str, info: ValidationInfo) -> str:
    """Check `file.py:function`: its form, that the file is there, and that it goes with the run.

    Raises:
        ValueError: It is not so.
    """
    match = re.match(FUNCTION_PATTERN, value)
    if match is None:
        raise ValueError(f"'file.py:function' was expected, got {value!r}")
    base = base_folder(info)
    if base is None:
        return value
    check_file(match["file"], info)
    reason = why_left_out(base, match["file"])
    if reason is not None:
        raise ValueError(f"{match['file']} would not be there when the job runs: {reason}")
    return value
