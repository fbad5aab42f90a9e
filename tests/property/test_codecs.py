"""Chunks compressed with zstd, lz4 and blosc, and what only HDF5's plugins read: numpy's rows, each chunk once."""

import itertools
import struct
import subprocess
import sys

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import lz4, zstd

from hpcutils.data.codecs import BLOSC, LZ4, ZSTD, unblosc, unlz4, unzstd, zstd_content_bytes
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.order import Order
from hpcutils.data.readers import ChunkReader, LibraryReader
from hpcutils.data.segments import count_chunks, layout_of
from hpcutils.data.windows import WindowReader
from hpcutils.errors import DataError

ROWS = 90
COMPRESSED = {
    "gzip": {"compression": "gzip"},
    "zstd": {"compression": hdf5plugin.Zstd(5)},
    "lz4": {"compression": hdf5plugin.LZ4()},
    "lz4 in blocks": {"compression": hdf5plugin.LZ4(nbytes=100)},
    **{
        f"blosc {name} {shuffle}": {"compression": hdf5plugin.Blosc(name, 5, shuffle)}
        for name, shuffle in itertools.product(("blosclz", "lz4", "lz4hc", "zlib", "zstd"), (0, 1, 2))
    },
}
BY_PLUGIN = {"bitshuffle": {"compression": hdf5plugin.Bitshuffle()}, "blosc2": {"compression": hdf5plugin.Blosc2()}}
DTYPES = ["f4", ">f4", "f8", "u1", "i2", ">i8", "?"]


def numbers(dtype):
    return np.random.default_rng(5).integers(0, 60, (ROWS, 5, 6)).astype(dtype)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("codecs") / "all.h5"
    with h5py.File(path, "w") as file:
        for (name, options), shuffle, dtype in itertools.product(COMPRESSED.items(), (False, True), DTYPES):
            chunks = (7, 3, 6) if shuffle else (16, 5, 6)
            file.create_dataset(f"{name}/{shuffle}/{dtype}", data=numbers(dtype), chunks=chunks, shuffle=shuffle, **options)
        for name, options in BY_PLUGIN.items():
            file.create_dataset(name, data=numbers("f4"), chunks=(7, 5, 6), **options)
    return path


@settings(max_examples=150)
@given(drawn=st.data(), name=st.sampled_from(list(COMPRESSED)), shuffle=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_rows_are_those_that_were_written(path, drawn, name, shuffle, dtype):
    start = drawn.draw(st.integers(0, ROWS - 1))
    expected = numbers(dtype)[start:]
    with HDF5Matrix(path, f"{name}/{shuffle}/{dtype}", start) as matrix:
        assert isinstance(matrix._open().reader, ChunkReader)
        assert matrix.dtype == expected.dtype
        wanted = np.array(drawn.draw(st.lists(st.integers(0, len(expected) - 1), max_size=20)), np.intp)
        np.testing.assert_array_equal(matrix.read_rows(wanted), expected[wanted])
        np.testing.assert_array_equal(matrix[wanted.max(initial=0) :], expected[wanted.max(initial=0) :])


@settings(max_examples=40)
@given(drawn=st.data(), name=st.sampled_from(list(COMPRESSED)), shuffle=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_windows_fetch_each_chunk_once(path, drawn, name, shuffle, dtype):
    matrix = HDF5Matrix(path, f"{name}/{shuffle}/{dtype}", drawn.draw(st.integers(0, 50)))
    order = Order(layout_of(matrix), drawn.draw(st.integers(1, 60)), seed=1)
    reader = WindowReader([matrix], order, None, 1)
    reader.begin(0)
    plan = order.epoch(0)
    for step in range(order.steps):
        cut = plan.cut(step)
        np.testing.assert_array_equal(reader.read(step, cut)[0], numbers(dtype)[matrix.start :][cut.rows])
    assert reader.chunks_read(0) == count_chunks(matrix.segments)
    reader.close()


@pytest.mark.parametrize("name", list(BY_PLUGIN))
def test_other_filters_are_read_by_hdf5(path, name):
    matrix = HDF5Matrix(path, name)
    assert isinstance(matrix._open().reader, LibraryReader)
    np.testing.assert_array_equal(matrix[[80, 3]], numbers("f4")[[80, 3]])


# -- streams that are damaged or say the wrong size -------------------------------------------------------------------

DATA = np.random.default_rng(0).integers(0, 9, 50_000).astype("u1").tobytes()


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """`DATA` as the plugins store it, with the call that undoes it."""
    with h5py.File(tmp_path_factory.mktemp("streams") / "s.h5", "w") as file:
        found = {}
        for name, call in (("zstd", unzstd), ("lz4", unlz4), ("lz4 in blocks", unlz4), ("blosc lz4 1", unblosc)):
            options = {"lz4 in blocks": {"compression": hdf5plugin.LZ4(nbytes=7000)}}.get(name) or COMPRESSED[name]
            dataset = file.create_dataset(name, data=np.frombuffer(DATA, "u1"), chunks=(len(DATA),), **options)
            found[name] = bytes(dataset.id.read_direct_chunk((0,))[1]), call
        return found


@pytest.mark.parametrize("name", ["zstd", "lz4", "lz4 in blocks", "blosc lz4 1"])
def test_what_cannot_be_undone_is_an_error(streams, name):
    """Not every changed byte: these formats have no check sums of the data (deflate has)."""
    stored, call = streams[name]
    assert call(stored, len(DATA)) == DATA
    for bad in (stored[:-2], stored[:20], stored[:7], b"", bytes(len(stored)), stored[:16] + b"\xff" * 40 + stored[56:]):
        with pytest.raises(DataError, match="compressed chunk"):
            call(bad, len(DATA))


@pytest.mark.parametrize("name", ["zstd", "lz4", "lz4 in blocks", "blosc lz4 1"])
@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 10])
def test_no_more_is_made_than_the_chunk_holds(streams, name, size):
    stored, call = streams[name]
    with pytest.raises(DataError, match=f"should hold {size} bytes and holds {len(DATA)}"):
        call(stored, size)


def test_headers_that_lie_make_no_more_either():
    """The header says that the size is right, the stream behind it makes more, or less."""
    packed = zstd.compress(bytes(10_000))
    assert zstd_content_bytes(packed) == 10_000
    descriptor, size = packed[4], struct.pack("<H", 100 - 256 & 0xFFFF)
    assert descriptor >> 6 == 1
    for said in (300, 65_000):
        with pytest.raises(DataError, match="damaged"):
            unzstd(packed[:5] + struct.pack("<H", said - 256) + packed[5 + len(size) :], said)
    block = lz4.compress(bytes(10_000))[4:]
    for said in (300, 65_000):
        with pytest.raises(DataError, match="damaged"):
            unlz4(struct.pack(">QII", said, said, len(block)) + block, said)


# -- what is not installed --------------------------------------------------------------------------------------------

WITHOUT = """
import sys
for name in {names!r}:
    sys.modules[name] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in {names!r} else found(name, *more)
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.errors import MissingPartError
try:
    print(HDF5Matrix({path!r}, {dataset!r})[:].sum())
except MissingPartError as exc:
    print(exc.exit_code, str(exc).replace(chr(10), " "))
"""


def told(path, dataset, *names):
    code = WITHOUT.format(path=str(path), dataset=dataset, names=names)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_each_package_alone_is_enough(path):
    total = str(numbers("f4").sum())
    for name in ("zstd", "lz4", "blosc zstd 2"):
        assert told(path, f"{name}/True/f4", "hdf5plugin").strip() == total
        assert told(path, f"{name}/True/f4", "numcodecs").strip() == total
    assert told(path, "bitshuffle").strip() == total, "hdf5plugin is imported when it is needed"


@pytest.mark.parametrize(("dataset", "code"), [("zstd", ZSTD), ("lz4", LZ4), ("blosc lz4 0", BLOSC)])
def test_without_both_the_missing_package_is_named(path, dataset, code):
    said = told(path, f"{dataset}/False/f4", "hdf5plugin", "numcodecs")
    assert said.startswith("12 ")
    assert f"is compressed with {dataset.split()[0]} (HDF5 filter {code}), which is not installed" in said
    assert "hint: install numcodecs, or hdf5plugin: pip install 'hpcutils[filters]'" in said


def test_a_filter_that_only_a_plugin_has(path):
    said = told(path, "bitshuffle", "hdf5plugin")
    assert "compressed with bitshuffle (HDF5 filter 32008)" in said
    assert "hint: install hdf5plugin" in said


def test_rows_that_were_never_written_need_no_filter(tmp_path):
    with h5py.File(tmp_path / "holes.h5", "w") as file:
        file.create_dataset("x", (50, 6), "f4", chunks=(8, 6), fillvalue=3, **COMPRESSED["zstd"])[20:30] = 1
    assert told(tmp_path / "holes.h5", "x", "hdf5plugin").strip() == str(float(50 * 18 - 10 * 12))
