"""References to datasets, as train.yaml has them: `images`, `digits.h5:images`, or a list of the latter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def listed(value: Any) -> Any:
    """Return one reference, or a list of them, as a tuple.

    Raises:
        ValueError: It is neither.
    """
    if not value or not isinstance(value, str | list | tuple):
        raise ValueError(f"the name of a dataset, or a list of them, was expected, got {value!r}")
    return (value,) if isinstance(value, str) else tuple(value)


def reference_problems(written: Any, files: Sequence[str]) -> Iterator[str]:
    """Yield why references lead nowhere: each names a dataset, of one of `files` where it says so; in a list it must say so.

    Args:
        written: `x` or `y` as it was written: what is no reference is left out.
        files: The names of `data.files`.
    """
    given = written if isinstance(written, list | tuple) else (written,)
    for reference in (each for each in given if isinstance(each, str)):
        file, _, dataset = reference.rpartition(":")
        if file and file not in files:
            yield f"{reference!r} names no file of 'files' ({', '.join(files)})"
        elif reference and not dataset:
            yield f"{reference!r} names no dataset: 'file:dataset' was expected"
        elif not file and len(given) > 1:
            yield f"{reference!r} names no file: in a list each is 'file:dataset'"
