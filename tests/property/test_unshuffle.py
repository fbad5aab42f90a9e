"""Bytes in planes become elements: by C-Blosc2 where it is installed, by numpy otherwise, and both alike."""

import importlib.metadata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcutils.data import unshuffle as module
from hpcutils.data.unshuffle import PART_ITEMS, interleave, library_call, unshuffle, unshuffle_into

SIZES = st.one_of(st.integers(0, 300), st.sampled_from([PART_ITEMS - 1, PART_ITEMS, PART_ITEMS + 17, 3 * PART_ITEMS]))
DTYPES = st.sampled_from(["<u2", ">i2", "<f2", "<f4", ">f4", "<i8", ">f8"])


def planes_of(array):
    """As HDF5's shuffle filter leaves the bytes."""
    return np.ascontiguousarray(array.view("u1").reshape(-1, array.itemsize).T)


@given(SIZES, DTYPES, st.integers(0, 9), st.integers(1, 3))
def test_both_ways_give_the_bytes_back(size, dtype, seed, stride):
    array = np.random.default_rng(seed).integers(0, 256, size * np.dtype(dtype).itemsize).astype("u1").view(dtype)
    for call in (unshuffle_into, interleave):
        # Every other element of something larger, too: what is between stays as it is.
        around = np.zeros(size * stride, dtype)
        call(planes_of(array), around[::stride])
        assert around[::stride].tobytes() == array.tobytes()
        assert all(not around[start::stride].any() for start in range(1, stride))
    assert unshuffle(planes_of(array)).tobytes() == array.tobytes()


@given(st.integers(2, 400), st.data())
def test_planes_may_be_a_part_of_wider_ones(size, data):
    low = data.draw(st.integers(0, size - 1))
    high = data.draw(st.integers(low, size))
    array = np.arange(size, dtype="<u4") * 0x01030507
    out = np.empty(high - low, "<u4")
    unshuffle_into(planes_of(array)[:, low:high], out)
    assert np.array_equal(out, array[low:high])


@pytest.mark.parametrize(("shape", "size", "dtype"), [((4, 8), 7, "u4"), ((4, 8), 8, "u2"), ((2, 8), 8, "u4"), ((4, 8), 9, "u4")])
def test_nothing_is_written_where_sizes_differ(shape, size, dtype):
    out = np.zeros(size, dtype)
    with pytest.raises(ValueError, match=r"byte planes of shape .* do not fill"):
        unshuffle_into(np.ones(shape, "u1"), out)
    assert not out.any()


def test_the_library_is_used_where_it_is_installed():
    try:
        installed = int(importlib.metadata.version("blosc2").split(".")[0]) >= 4
    except importlib.metadata.PackageNotFoundError:
        installed = False
    assert (library_call() is not None) == installed


@pytest.mark.parametrize("said", [None, -1])
def test_without_the_library_or_when_it_refuses_numpy_does_it(monkeypatch, said):
    monkeypatch.setattr(module, "library_call", lambda: None if said is None else lambda *_: said)
    array = np.arange(1000, dtype="<f8")
    assert np.array_equal(unshuffle(planes_of(array)).view("<f8"), array)
