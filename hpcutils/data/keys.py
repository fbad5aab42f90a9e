"""From a numpy key to the rows it needs, and from rows to the chunks that hold them: arithmetic only, no file.

A key is split in two: which rows (axis 0) must be read, and what to do with the rows once they are there. Only the first
half is ours; the second is left to numpy, so every kind of key means what numpy says it means.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import EllipsisType
from typing import Any, SupportsIndex, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

IntArray: TypeAlias = NDArray[np.intp]
Rows: TypeAlias = "range | IntArray"
Item: TypeAlias = "int | slice | EllipsisType | bool | IntArray | NDArray[np.bool_] | None"

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class KeyPlan:
    """What a key asks of the file, and of numpy afterwards.

    Attributes:
        rows: Row numbers to read, in the order and as often as wanted.
        key: What to index the `(len(rows), …)` array with; `None` when that array is the answer.
        row_axis: The axis of the answer along which the rows lie, when it can be made piece by piece; else `None`.
    """

    rows: Rows
    key: tuple[Item, ...] | None
    row_axis: int | None

    def answer_shape(self, row_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the answer, or raise what numpy raises for the other axes, before anything is read."""
        stand_in = _stand_in((len(self.rows), *row_shape))
        return stand_in.shape if self.key is None else cast(NDArray[Any], stand_in[self.key]).shape


@dataclass(frozen=True, eq=False)
class Group:
    """The wanted rows of one chunk: `local` counts from the chunk's first row, `place` is where they go."""

    chunk: int
    local: slice | IntArray
    place: slice | IntArray


def plan_key(key: Any, shape: tuple[int, ...]) -> KeyPlan:
    """Plan the reading of `array[key]` for an array of `shape` (at least 1-D).

    Raises:
        IndexError, TypeError, ValueError: As numpy would, for what the key says about axis 0.
    """
    try:
        return _plan_key(key, shape)
    except (IndexError, TypeError, ValueError):
        _stand_in(shape)[key]  # of several mistakes in one key numpy names one: let it choose
        raise


def _plan_key(key: Any, shape: tuple[int, ...]) -> KeyPlan:
    """Find the item of the key that is about axis 0, and replace it by one for the rows that will have been read."""
    items = [_item(item) for item in (key if isinstance(key, tuple) else (key,))]
    if sum(map(_axes, items)) > len(shape) or sum(item is Ellipsis for item in items) > 1:
        raise IndexError(f"{key!r} has more indices than an array of shape {shape} has axes, or `...` twice")
    position = _row_position(items, len(shape))
    item = items[position]
    others = items[:position] + items[position + 1 :]
    if isinstance(item, slice):
        items[position] = ALL
        return _plan(range(shape[0])[item], items, position, all(_is_basic(other) for other in others))
    if not isinstance(item, np.ndarray):
        row = _checked_int(operator.index(cast(int, item)), shape[0])
        items[position] = 0
        return KeyPlan(range(row, row + 1), tuple(items), None)
    return _plan_array(item, items, position, shape)


def _plan_array(item: IntArray | NDArray[np.bool_], items: list[Item], position: int, shape: tuple[int, ...]) -> KeyPlan:
    """Plan a key whose axis 0 is picked by an array of row numbers or by a mask."""
    if item.dtype.kind == "b":
        # An axis of length 0 fits any, as numpy has it: nothing is picked.
        if any(own not in (0, size) for own, size in zip(item.shape, shape, strict=False)):
            raise IndexError(f"a mask of shape {item.shape} does not fit an array of shape {shape}")
        items[position : position + 1] = item.nonzero()  # one array of indices for each axis of the mask
    wanted = _checked_rows(cast(IntArray, items[position]), shape[0])
    others = items[:position] + items[position + 1 :]
    if wanted.ndim == 1 and all(other is None or other is Ellipsis or isinstance(other, slice) for other in others):
        items[position] = ALL
        return _plan(wanted, items, position, True)
    # Other advanced indices take part: numpy combines them with ours, so only the row numbers are replaced.
    rows, inverse = np.unique(wanted, return_inverse=True)
    items[position] = inverse.reshape(wanted.shape)
    return KeyPlan(rows, tuple(items), None)


def _plan(rows: Rows, items: list[Item], position: int, basic: bool) -> KeyPlan:
    """Return the plan for `items`, whose row item is `ALL` by now."""
    if basic and all(item is Ellipsis or item == ALL for item in items):
        return KeyPlan(rows, None, None)
    # Only None, which adds an axis, can stand before the row item (an empty Ellipsis adds none).
    return KeyPlan(rows, tuple(items), items[:position].count(None) if basic else None)


def _item(item: Any) -> Item:
    """Return one element of a key in one of the few forms that the rest of this module knows."""
    if item is None or item is Ellipsis or isinstance(item, slice | bool):
        return cast(Item, item)
    if isinstance(item, SupportsIndex) and not hasattr(item, "__array__"):
        return operator.index(item)
    array = np.asarray(item)
    if array.size == 0 and not isinstance(item, np.ndarray):
        array = array.astype(np.intp)  # as numpy does for []
    if array.dtype.kind not in "iub":
        raise IndexError(f"an index is an integer, a slice, `...`, None, or an array of integers or booleans, got {item!r}")
    if array.ndim == 0:
        return cast(Item, array.item())
    return array if array.dtype.kind == "b" else array.astype(np.intp)


def _axes(item: Item) -> int:
    """Return how many axes of the array an item uses up."""
    if isinstance(item, np.ndarray):
        return item.ndim if item.dtype.kind == "b" else 1
    return 0 if item is None or item is Ellipsis or isinstance(item, bool) else 1


def _row_position(items: list[Item], ndim: int) -> int:
    """Return where the item for axis 0 is; where none is written, put `:` in (`...` and the end of a key imply it)."""
    spare = ndim - sum(map(_axes, items))
    for position, item in enumerate(items):
        if _axes(item) > 0:
            return position
        if item is Ellipsis and spare > 0:
            items.insert(position, ALL)
            return position
    items.append(ALL)
    return len(items) - 1


def _is_basic(item: Item) -> bool:
    return not isinstance(item, np.ndarray | bool)


def _checked_int(index: int, size: int) -> int:
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of bounds for axis 0 with size {size}")
    return index % size


def _checked_rows(rows: IntArray, size: int) -> IntArray:
    """Return row numbers with the negative ones counted from the end."""
    if rows.size == 0 or (rows.min() >= 0 and rows.max() < size):
        return rows
    bad = (rows < -size) | (rows >= size)
    if bad.any():
        _checked_int(int(rows[bad][0]), size)
    return np.where(rows < 0, rows + size, rows)


def _stand_in(shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Return an array of `shape` that takes one byte of memory."""
    return np.broadcast_to(np.zeros((), np.int8), shape)


def group_rows(rows: Rows, chunk_rows: int) -> list[Group]:
    """Sort wanted rows into the chunks that hold them, so that each chunk is visited once.

    Args:
        rows: Row numbers, not negative, in any order, repeated or not.
        chunk_rows: Rows of a chunk.
    """
    if isinstance(rows, range) and rows.step == 1:
        return _group_range(rows, chunk_rows)
    wanted = np.asarray(rows, np.intp)
    order = np.argsort(wanted, kind="stable")
    ordered = wanted[order]
    chunks = ordered // chunk_rows
    edges = [0, *(np.flatnonzero(np.diff(chunks)) + 1).tolist(), len(ordered)]
    return [
        Group(chunk := int(chunks[low]), _compact(ordered[low:high] - chunk * chunk_rows), order[low:high])
        for low, high in pairwise(edges)
        if high > low
    ]


def _group_range(rows: range, chunk_rows: int) -> list[Group]:
    groups, start = [], rows.start
    while start < rows.stop:
        chunk = start // chunk_rows
        stop = min((chunk + 1) * chunk_rows, rows.stop)
        local = slice(start - chunk * chunk_rows, stop - chunk * chunk_rows)
        groups.append(Group(chunk, local, slice(start - rows.start, stop - rows.start)))
        start = stop
    return groups


def _compact(local: IntArray) -> slice | IntArray:
    """Return ascending row numbers as a slice where they follow each other: a slice copies faster."""
    if len(local) == 1 or bool(np.all(np.diff(local) == 1)):
        return slice(int(local[0]), int(local[-1]) + 1)
    return local


def split_runs(ordered: IntArray, max_gap: int, max_rows: int) -> Sequence[tuple[int, int]]:
    """Cut ascending row numbers into runs that are worth one read each.

    Args:
        ordered: Row numbers, ascending, repeats allowed.
        max_gap: Unwanted rows that may be read along between two wanted ones.
        max_rows: Rows that one read may cover.

    Returns:
        `(low, high)` positions in `ordered`, half open.
    """
    apart = (np.diff(ordered) > max_gap + 1) | (np.diff(ordered // max_rows) != 0)
    edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(ordered)]
    return [(low, high) for low, high in pairwise(edges) if high > low]
