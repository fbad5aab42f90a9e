"""A user's own `Sequence`: made by a function of the job's code, the same in every process that has a copy of it.

Light: a worker process imports what the user's module does, and neither MPI nor, by itself, TensorFlow.
"""

from __future__ import annotations

import inspect
import random
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hpcutils.errors import DataError, HpcutilsError, JobFailedError, SpecError
from hpcutils.train.usercode import load_function

Array: TypeAlias = NDArray[Any]

TRACEBACK_HINT = "the traceback is above, in this rank's log"


@dataclass(frozen=True)
class Recipe:
    """How a process makes its copy of a Sequence.

    Args:
        reference: The function, `file.py:function`.
        code: Folder of the run's code.
        args: The function's keyword arguments.
        files: Paths of the staged files by name, for a function with a parameter `files`.
        seed: Of Python's and numpy's global generators while the function runs: all copies begin alike.
    """

    reference: str
    code: str
    args: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    seed: int = 0


class Copy:
    """A process' own copy of a Sequence, kept at the same epoch as all others.

    Args:
        recipe: How to make it.

    Raises:
        SpecError: There is no such function, its arguments do not fit, or what it returned has no number of batches.

    Attributes:
        sequence: The object that the user's function returned.
        batches: Number of its batches.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.sequence = call(recipe)
        self.batches = count_batches(self.sequence, recipe.reference)
        if hasattr(self.sequence, "use_multiprocessing"):
            # Keras' word for "other copies make batches, too": `MatrixSequence`, for one, then does not wait in `on_epoch_end`
            # for batches that this copy is never asked for.
            self.sequence.use_multiprocessing = True
        self._ended, self._begun = 0, False

    def begin(self, epoch: int) -> None:
        """Begin an epoch; `on_epoch_end` has been called once for each epoch before it then, whoever trained them."""
        while self._ended < epoch:
            self._begin()
            self.end()
        self._begin()

    def end(self) -> None:
        """End the epoch that has begun.

        Raises:
            DataError: The Sequence has another number of batches now.
        """
        self._call("on_epoch_end")
        self._ended, self._begun = self._ended + 1, False
        now = count_batches(self.sequence, self.recipe.reference)
        if now != self.batches:
            raise DataError(
                f"{self.recipe.reference}: the Sequence has {now} batches after on_epoch_end, and had {self.batches}",
                "the number of batches stays the same in all epochs",
            )

    def make(self, number: int) -> Any:
        """Return batch `number`, all of it numpy arrays.

        Raises:
            JobFailedError: The user's code failed; its traceback is on stderr.
        """
        try:
            return as_arrays(self.sequence[number])
        except HpcutilsError:
            raise
        except Exception as exc:
            traceback.print_exc()
            raise JobFailedError(f"batch {number} of {self.recipe.reference}: {type(exc).__name__}: {exc}", TRACEBACK_HINT) from exc

    def _begin(self) -> None:
        if not self._begun:
            self._call("on_epoch_begin")
        self._begun = True

    def _call(self, name: str) -> None:
        function = getattr(self.sequence, name, None)
        if function is not None:
            function()


def call(recipe: Recipe) -> Any:
    """Call the user's function and return what it returns.

    Raises:
        SpecError: It is not there, or its arguments do not fit.
    """
    function = load_function(recipe.reference, Path(recipe.code))
    takes_files = "files" in inspect.signature(function).parameters
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)
    try:
        return function(**recipe.args, **({"files": dict(recipe.files)} if takes_files else {}))
    except TypeError as exc:
        if exc.__traceback__ is not None and exc.__traceback__.tb_next is not None:
            raise  # inside the user's function, not in the call
        raise SpecError(f"data.args do not fit {recipe.reference}: {exc}") from exc


def count_batches(sequence: Any, reference: str) -> int:
    """Return the number of batches of an epoch.

    Raises:
        SpecError: It has none: no `Sequence`, or one without end.
        DataError: It is 0.
    """
    try:
        count = sequence.num_batches if hasattr(type(sequence), "num_batches") else len(sequence)
    except (TypeError, NotImplementedError) as exc:
        what = f"{reference} returned {type(sequence).__name__}, which has no number of batches: {exc}"
        raise SpecError(what, "return an object of a class derived from hpcutils.utils.Sequence") from exc
    if count is None:
        raise SpecError(f"{reference}: a Sequence without end cannot be cut into epochs", "give it a __len__")
    if count < 1:
        raise DataError(f"{reference}: the Sequence has {count} batches", "look at data.args, and at the data that it finds")
    return int(count)


def as_arrays(part: Any) -> Any:
    """Return nested dicts, tuples and lists (as tuples) of numpy arrays."""
    if isinstance(part, dict):
        return {key: as_arrays(value) for key, value in part.items()}
    if isinstance(part, tuple | list):
        return tuple(as_arrays(value) for value in part)
    return np.asarray(part)


def leaves(name: str, part: Any) -> Iterator[tuple[str, Array]]:
    """Yield the arrays in `part` with names like `x[0]['left']`; keys of dicts in sorted order."""
    if isinstance(part, dict):
        for key in sorted(part):
            yield from leaves(f"{name}[{key!r}]", part[key])
    elif isinstance(part, tuple):
        for number, value in enumerate(part):
            yield from leaves(f"{name}[{number}]", value)
    else:
        yield name, part


def rebuilt(part: Any, values: Iterator[Any]) -> Any:
    """Return `part` with other values in the place of its arrays, which come in the order of `leaves`."""
    if isinstance(part, dict):
        return {key: rebuilt(part[key], values) for key in sorted(part)}
    if isinstance(part, tuple):
        return tuple(rebuilt(value, values) for value in part)
    return next(values)


@dataclass(frozen=True)
class Form:
    """What all batches of a Sequence have in common, taken from its first.

    Args:
        reference: The function that made it, for messages.
        rows: Samples of a batch.
        parts: Name, shape of a sample and type of each array.
        example: The first batch itself.
    """

    reference: str
    rows: int
    parts: tuple[tuple[str, tuple[int, ...], str], ...]
    example: Any

    @property
    def arrays(self) -> list[Array]:
        """The arrays of the first batch."""
        return [array for _, array in parts_of(self.example)]

    @property
    def is_weighted(self) -> bool:
        """Whether the Sequence gives weights of its own."""
        return len(self.example) > 2

    def check(self, batch: Any, number: int, rows: int | None = None) -> list[Array]:
        """Return the arrays of batch `number`, x first.

        Raises:
            DataError: It has not `rows` rows (`None`: as many in all arrays), or is not made as the first batch is.
        """
        found = list(checked(batch, number, self.reference))
        parts = tuple((name, array.shape[1:], str(array.dtype)) for name, array in found)
        if parts != self.parts:
            raise DataError(
                f"batch {number} of {self.reference} is {_said(parts)}; batch 0 is {_said(self.parts)}",
                "the arrays of all batches have the same types, and the same shapes but for the number of rows",
            )
        rows = len(found[0][1]) if rows is None else rows
        for name, array in found:
            if len(array) != rows:
                raise DataError(
                    f"batch {number} of {self.reference}: {name} has {len(array)} rows, {rows} were expected",
                    "all batches have as many rows as batch 0, in all epochs; the last one may have fewer",
                )
        return [array for _, array in found]


def form_of(batch: Any, reference: str) -> Form:
    """Return the form of a first batch.

    Raises:
        DataError: It is not `(x, y)` or `(x, y, weight)` of arrays with the same number of rows.
    """
    found = list(checked(batch, 0, reference))
    parts = tuple((name, array.shape[1:], str(array.dtype)) for name, array in found)
    form = Form(reference, len(found[0][1]), parts, batch)
    form.check(batch, 0, form.rows)
    if not form.rows:
        raise DataError(f"batch 0 of {reference} has no rows", "look at data.args, and at the data that it finds")
    return form


def checked(batch: Any, number: int, reference: str) -> Iterator[tuple[str, Array]]:
    """Yield the arrays of a batch with their names.

    Raises:
        DataError: It is not `(x, y)` or `(x, y, weight)` with rows.
    """
    hint = "__getitem__ returns (x, y) or (x, y, weight); x may be a dict, tuple or list of arrays, the others are arrays"
    if not isinstance(batch, tuple) or len(batch) not in (2, 3):
        what = f"a tuple of {len(batch)}" if isinstance(batch, tuple) else f"one {type(batch).__name__}"
        raise DataError(f"batch {number} of {reference} is {what}", hint)
    for name, part in zip(("y", "weight"), batch[1:], strict=False):
        if not isinstance(part, np.ndarray):
            raise DataError(f"batch {number} of {reference}: {name} is a {type(part).__name__}, no array", hint)
    for name, array in parts_of(batch):
        if not isinstance(array, np.ndarray) or array.ndim < 1 or array.dtype == object:
            raise DataError(f"batch {number} of {reference}: {name} is no array with rows", "its first axis is the samples")
        yield name, array


def parts_of(batch: Any) -> Iterator[tuple[str, Array]]:
    """Yield the arrays of a batch with their names: those of x, then y, then the weight."""
    for name, part in zip(("x", "y", "weight"), batch, strict=False):
        yield from leaves(name, part)


def _said(parts: tuple[tuple[str, tuple[int, ...], str], ...]) -> str:
    return ", ".join(f"{name} {dtype} (rows{''.join(f', {size}' for size in shape)})" for name, shape, dtype in parts)
