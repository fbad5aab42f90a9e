"""References to datasets, as train.yaml has them: `images`, `digits.h5:images`, or a list of the latter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def listed(value: Any) -> Any:
    """Return one reference, or a list of them, as a tuple.

    Raises:
        ValueError: It is neither.
    """
    if not value or not isinstance(value, str | list | tuple):
        raise ValueError(f"the name of a dataset, or a list of them, was expected, got {value!r}")
    return (value,) if isinstance(value, str) else tuple(value)


def check_references(references: Sequence[str], files: Sequence[str]) -> None:
    """Raise `ValueError` unless each reference names a dataset, of one of `files` where it says so; in a list it must say so."""
    for reference in references:
        file, _, dataset = reference.rpartition(":")
        if file and file not in files:
            raise ValueError(f"{reference!r} names no file of 'files' ({', '.join(files)})")
        if not dataset:
            raise ValueError(f"{reference!r} names no dataset: 'file:dataset' was expected")
        if not file and len(references) > 1:
            raise ValueError(f"{reference!r} names no file: in a list each is 'file:dataset'")
