"""Class labels to rows of a binary matrix, and vectors to unit length: plain numpy, nothing of Keras.

Both functions work through their input in blocks that stay in a core's cache, so that each byte of the result is
written to memory once.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

# Elements of a block: 64 Ki float32 (256 KiB) lie in the second-level cache of every current core.
BLOCK_ITEMS = 1 << 16
# An identity matrix up to this size is read from cache: 1000 classes of float32 are 4 MB.
TABLE_BYTES = 4 << 20
# More elements than any array has, of up to 16 bytes each.
MAX_ITEMS = int(np.iinfo(np.intp).max) // 16
FLOATS = (float, np.floating)
# Norms beyond this, and below its inverse, are not taken from a root that is not exact.
MOST_ROOT = 2.0**64


def to_categorical(y: ArrayLike, num_classes: SupportsIndex | None = None, dtype: DTypeLike = "float32") -> NDArray[Any]:
    """Turn integer class labels into one-hot rows, the classes along a new last axis.

    Args:
        y: Labels from 0 to `num_classes - 1`, any shape; floats and objects are taken when each is a whole number. A
            last axis of size 1 is dropped when there is another: `(n, 1)` counts as `(n,)`.
        num_classes: Number of classes C; `None` takes the largest label plus one.
        dtype: Data type of the result, any that numpy knows.

    Returns:
        An array of shape `y.shape + (C,)` and type `dtype`; a scalar label gives `(C,)`.

    Raises:
        ValueError: A label is negative, too large, not a whole number or not a number at all (the message names the
            first such label and its place); or `y` is empty and `num_classes` is `None`.
        TypeError: `num_classes` is not an integer.
    """
    labels = np.asarray(y)
    if labels.ndim > 1 and labels.shape[-1] == 1:
        labels = labels.reshape(labels.shape[:-1])
    labels = _whole_numbers(labels)
    classes = _class_count(labels, num_classes)
    _check_range(labels, classes, num_classes is not None)
    return _one_hot(labels.reshape(-1), classes, np.dtype(dtype)).reshape(*labels.shape, classes)


def normalize(x: ArrayLike, axis: SupportsIndex = -1, order: float = 2) -> NDArray[Any]:
    """Divide the vectors along `axis` by their norm.

    The shape is kept: a 1-D array stays 1-D (`keras.utils.normalize`, old and new, turns it into `(1, n)`). A vector
    of norm zero is divided by one, so it stays zero.

    Args:
        x: Numbers, at least 1-D. Integers and booleans become float64; float16, bfloat16, float32, float64 and complex
            types stay what they are. Sums of powers may leave the range of the type: the norm need not.
        axis: The axis along which the vectors lie.
        order: Order of the norm, as in `numpy.linalg.norm`: 2, 1, `np.inf`, 0, or another number.

    Returns:
        A new array of the shape of `x`.

    Raises:
        numpy.exceptions.AxisError: `axis` is not an axis of `x` (an `IndexError` and a `ValueError`).
        ValueError: `x` does not hold numbers.
    """
    array = np.asarray(x)
    if array.dtype.kind not in "biufc" and array.dtype.name != "bfloat16":
        raise ValueError(f"normalize takes numbers, got an array of type {array.dtype}")
    if array.dtype.kind in "biu":
        array = array.astype(np.float64)
    axis = np.lib.array_utils.normalize_axis_index(operator.index(axis), array.ndim)
    if array.size == 0:
        return array.copy()
    # (rows, length, inner): the vectors lie along the middle axis.
    vectors = array.reshape(math.prod(array.shape[:axis]), array.shape[axis], -1)
    out = np.empty(vectors.shape, array.dtype)
    step = max(1, BLOCK_ITEMS // (vectors.shape[1] * vectors.shape[2]))
    for start in range(0, len(vectors), step):
        block = vectors[start : start + step]
        if block.dtype.itemsize == 2:
            block = block.astype(np.float32)  # squares of float16 overflow from 256 on; bfloat16 is coarse
        _divide(block, order, out[start : start + step])
    return out.reshape(array.shape)


def _divide(block: NDArray[Any], order: float, out: NDArray[Any]) -> None:
    """Fill `out` with the vectors along axis 1 of `block`, `(rows, length, inner)`, divided by their norms."""
    with np.errstate(over="ignore", under="ignore"):
        norms = _norms(block, order)
    low, high = _trusted(norms.dtype, order)
    doubtful = not (low <= norms.min() and norms.max() <= high)
    lost = ~((norms >= low) & (norms <= high)) if doubtful else None
    if doubtful:
        norms[norms == 0] = 1
    # The type of `out` is the one that was given: float32 goes into float16 again.
    np.divide(block, norms, out=out, casting="unsafe")
    if lost is not None:
        _divide_scaled(block, lost[:, 0, :], order, out)


@functools.cache
def _trusted(dtype: np.dtype[Any], order: float) -> tuple[float, float]:
    """Return the least and the largest norm that is right as computed; outside, sums of powers left the range of the type."""
    limits = np.finfo(dtype)
    low, high = max(float(limits.smallest_subnormal), 5e-324), float(limits.max)
    if order == 0 or math.isinf(order):
        return low, high  # no sums of powers
    if order not in (1, 2):
        # A root by `1 / order`, rounded, is off by up to ln(norm) / 4 units in the last place.
        low, high = max(low, 1 / MOST_ROOT), min(high, MOST_ROOT)
    with np.errstate(all="ignore"):
        # A smaller sum has lost digits of its terms, which lie below the smallest normal number.
        bound = float(np.power(np.float64(limits.tiny / limits.eps), 1 / order))
    return (max(low, bound), high) if order > 0 else (low, min(high, bound))


def _divide_scaled(block: NDArray[Any], lost: NDArray[np.bool_], order: float, out: NDArray[Any]) -> None:
    """Divide the vectors that `lost`, `(rows, inner)`, names once more, each scaled so that its norm is near one."""
    vectors = np.moveaxis(block, 1, 2)[lost]  # (lost vectors, length)
    vectors = vectors.astype(vectors.dtype.newbyteorder("="))
    sizes = np.abs(vectors)
    scales = sizes.max(axis=1) if order > 0 else sizes.min(axis=1)
    # The norm of the others is right: zero, infinite, or no number.
    right = np.isfinite(scales) & (scales > 0)
    with np.errstate(over="ignore", under="ignore"):
        # As pairs of real numbers: numpy's complex division fails for the smallest divisors.
        scaled = (vectors[right].view(scales.dtype) / scales[right, None]).view(vectors.dtype)
        scaled /= np.linalg.norm(scaled, ord=order, axis=1, keepdims=True)
    rows, columns = (places[right] for places in lost.nonzero())
    out[rows, :, columns] = scaled


def _norms(block: NDArray[Any], order: float) -> NDArray[Any]:
    """Return the norms along axis 1, `(rows, 1, inner)`."""
    if order == 2 and block.dtype.kind == "f":
        sums = np.zeros((block.shape[0], block.shape[2]), block.dtype.newbyteorder("="))
        # Long vectors in parts: they stay in cache, and float32 sums of sums are more exact than one long sum.
        step = max(1, BLOCK_ITEMS // block.shape[2])
        for start in range(0, block.shape[1], step):
            part = block[:, start : start + step]
            sums += np.einsum("rli,rli->ri", part, part)  # (rows, inner), without the temporary of linalg.norm
        norms = np.sqrt(sums)[:, None, :]
    else:
        norms = np.linalg.norm(block, ord=order, axis=1, keepdims=True)
    return cast(NDArray[Any], norms)


def _whole_numbers(labels: NDArray[Any]) -> NDArray[Any]:
    """Return `labels` as an array of the same shape: of integers, or of Python's where some label is too large for one."""
    if labels.dtype.kind in "iub":
        return labels.view(np.uint8) if labels.dtype.kind == "b" else labels
    if labels.dtype.kind == "O":
        return _whole_objects(labels)
    if labels.size == 0:
        return labels.astype(np.intp)
    if labels.dtype.kind != "f":
        raise ValueError(f"labels are whole numbers, got an array of type {labels.dtype}: {_first(labels)}")
    if labels.dtype.itemsize == 2:
        labels = labels.astype(np.float32)  # 2**53 is more than a float16 can hold
    # 2**53: above it neighbouring whole numbers share one float64.
    bad = ~((np.trunc(labels) == labels) & (np.abs(labels) <= 2.0**53))
    if bad.any():
        raise ValueError(f"labels are whole numbers, got {_at(labels, int(bad.argmax()))}")
    return labels.astype(np.int64)


def _whole_objects(labels: NDArray[Any]) -> NDArray[Any]:
    """Return an array of Python objects as one of integers."""
    for place, label in enumerate(labels.flat):
        # (a float that is no number is no integer either)
        if not isinstance(label, int | np.integer | np.bool_) and not (isinstance(label, FLOATS) and label.is_integer()):
            hint = ": make a list of it" if labels.ndim == 0 and isinstance(label, Iterable) else ""
            raise ValueError(f"labels are whole numbers, got {label!r} ({type(label).__name__}){_place(labels, place)}{hint}")
    whole = [int(label) for label in labels.flat]
    fits = all(abs(label) < 2**63 for label in whole)
    return np.array(whole, np.int64 if fits else object).reshape(labels.shape)


def _class_count(labels: NDArray[Any], num_classes: SupportsIndex | None) -> int:
    if num_classes is None:
        if labels.size == 0:
            raise ValueError("no labels: give num_classes, it cannot be found from an empty array")
        return max(int(labels.max()) + 1, 0)
    count = operator.index(num_classes)
    if count < 0:
        raise ValueError(f"num_classes is a count, got {count}")
    return count


def _check_range(labels: NDArray[Any], classes: int, given: bool) -> None:
    """Raise when a label is none of the classes; `given` says that their number did not come from the labels."""
    if labels.size == 0:
        return
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        bad = (labels < 0) | (labels >= classes)
        if not given:
            rule = "labels are not negative"
        elif classes == 0:
            rule = "num_classes is 0, so there is no label"
        else:
            rule = f"labels lie from 0 to {classes - 1} ({classes} classes)"
        raise ValueError(f"{rule}, got {_at(labels, int(bad.argmax()))}")
    if not given and classes * labels.size > MAX_ITEMS:
        raise ValueError(f"{_at(labels, int(labels.argmax()))} asks for {classes} classes, more than an array can have")


def _at(labels: NDArray[Any], flat_index: int) -> str:
    """Return `label 7 at index (2, 0)`."""
    label = labels.flat[flat_index]
    return f"label {label.item() if isinstance(label, np.generic) else label!r}{_place(labels, flat_index)}"


def _place(labels: NDArray[Any], flat_index: int) -> str:
    """Return ` at index (2, 0)`; nothing for an array without axes."""
    place = tuple(int(i) for i in np.unravel_index(flat_index, labels.shape))
    return "" if not place else f" at index {place[0] if len(place) == 1 else place}"


def _first(labels: NDArray[Any]) -> str:
    return _at(labels, 0) if labels.dtype.names is None else "a record"


def _one_hot(flat: NDArray[Any], classes: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the `(n, classes)` matrix; `flat` is known to be in range."""
    if classes > flat.size or classes * classes * dtype.itemsize > TABLE_BYTES:
        out = np.zeros((flat.size, classes), dtype)
        out[np.arange(flat.size), flat] = dtype.type(1)
        return out
    # Copying rows of a small identity matrix writes each byte once; zeros and ones would touch every page twice.
    table = np.eye(classes, dtype=dtype)
    out = np.empty((flat.size, classes), dtype)
    for start in range(0, flat.size, BLOCK_ITEMS):
        block = slice(start, start + BLOCK_ITEMS)
        # The mode is 'clip' because 'raise' makes numpy fill a second buffer first.
        np.take(table, flat[block].astype(np.intp, copy=False), axis=0, out=out[block], mode="clip")
    return out
