"""Virtual datasets: runs of rows are read from their sources, each chunk once; everything else by HDF5, and all as numpy says."""

import os

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.order import Order
from hpcutils.data.readers import LibraryReader
from hpcutils.data.segments import count_chunks, layout_of
from hpcutils.data.views import ViewReader
from hpcutils.data.windows import WindowReader
from hpcutils.errors import DataError

ARRAYS = {
    name: (np.arange(rows * 6).reshape(rows, 6) + 1000 * number).astype("f4")
    for number, (name, rows) in enumerate((("a", 50), ("b", 33), ("plain", 20)))
}
CHUNKED = {"chunks": (8, 4), "compression": "gzip", "shuffle": True}
# (source, first row, rows), one after the other.
RUNS = [("a", 3, 30), ("b", 0, 33), ("a", 33, 17), ("plain", 5, 10), ("a", 0, 8), ("a", 8, 8)]


def write_view(file, runs, name="view", other="."):
    layout = h5py.VirtualLayout((sum(rows for _, _, rows in runs), 6), "f4")
    done = 0
    for source, first, rows in runs:
        layout[done : done + rows] = h5py.VirtualSource(other, source, ARRAYS[source].shape, "f4")[first : first + rows]
        done += rows
    file.create_virtual_dataset(name, layout, fillvalue=-1)
    return np.concatenate([ARRAYS[source][first : first + rows] for source, first, rows in runs])


def write_sources(file):
    for name, array in ARRAYS.items():
        file.create_dataset(name, data=array, **({} if name == "plain" else CHUNKED))


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    path = tmp_path_factory.mktemp("views") / "view.h5"
    with h5py.File(path, "w") as file:
        write_sources(file)
        array = write_view(file, RUNS)
        layout = h5py.VirtualLayout((len(array) + 33, 6), "f4")
        layout[: len(array)] = h5py.VirtualSource(".", "view", array.shape, "f4")
        layout[len(array) :] = h5py.VirtualSource(".", "b", (33, 6), "f4")
        file.create_virtual_dataset("view of a view", layout)
    return path, array


@given(drawn=st.data())
def test_rows_are_those_of_the_sources(view, drawn):
    path, array = view
    name = drawn.draw(st.sampled_from(["view", "view of a view"]))
    expected = array if name == "view" else np.concatenate([array, ARRAYS["b"]])
    start = drawn.draw(st.integers(0, len(expected)))
    expected = expected[start:]
    with HDF5Matrix(path, name, start) as matrix:
        assert isinstance(matrix._open().reader, ViewReader)
        wanted = np.array(
            drawn.draw(st.lists(st.integers(0, max(len(expected) - 1, 0)), max_size=20 * bool(len(expected)))), np.intp
        )
        np.testing.assert_array_equal(matrix.read_rows(wanted), expected[wanted])
        low = drawn.draw(st.integers(0, len(expected)))
        np.testing.assert_array_equal(matrix[low:], expected[low:])
        np.testing.assert_array_equal(matrix[::-3], expected[::-3])


def test_each_chunk_of_the_sources_is_fetched_once(tmp_path):
    """HDF5 was asked for pieces of 1 MiB, which cut chunks in two, and counted those."""
    rows = np.arange(1000 * 6, dtype="f4").reshape(1000, 6)
    with h5py.File(tmp_path / "view.h5", "w") as file:
        file.create_dataset("a", data=rows, chunks=(8, 6), compression="gzip")
        layout = h5py.VirtualLayout((1500, 6), "f4")
        layout[:700] = h5py.VirtualSource(".", "a", rows.shape, "f4")[300:]
        layout[700:] = h5py.VirtualSource(".", "a", rows.shape, "f4")[:800]
        file.create_virtual_dataset("view", layout)
    matrix = HDF5Matrix(tmp_path / "view.h5", "view")
    order = Order(layout_of(matrix), 50, seed=1)
    reader = WindowReader([matrix], order, None, 1)
    fetched = []
    part = matrix._open().reader._readers[0]
    fetch = part._fetch
    part._fetch = lambda start: (fetched.append(start), fetch(start))[1]
    reader.begin(0)
    plan = order.epoch(0)
    for step in range(order.steps):
        cut = plan.cut(step)
        np.testing.assert_array_equal(reader.read(step, cut)[0], np.concatenate([rows[300:], rows[:800]])[cut.rows])
    assert reader.chunks_read(0) == len(fetched) == count_chunks(matrix.segments) == 88 + 100
    reader.close()


def backwards(layout, source):
    layout[:50:2], layout[1:50:2] = source[:25], source[25:]


def other_axis(layout, source):
    layout[:, :3], layout[:, 3:] = source[:, 3:], source[:, :3]


def gap(layout, source):
    layout[10:] = source[10:]


def overlap(layout, source):
    layout[:30] = source[:30]
    layout[20:] = source[20:]


def every_second(layout, source):
    layout[:25] = source[::2]


@pytest.mark.parametrize("shape", [backwards, other_axis, gap, overlap, every_second])
def test_everything_else_is_left_to_hdf5(tmp_path, shape):
    with h5py.File(tmp_path / "view.h5", "w") as file:
        write_sources(file)
        layout = h5py.VirtualLayout((50, 6), "f4")
        shape(layout, h5py.VirtualSource(".", "a", (50, 6), "f4"))
        file.create_virtual_dataset("view", layout, fillvalue=-1)
    with h5py.File(tmp_path / "view.h5") as file:
        expected = file["view"][:]
    matrix = HDF5Matrix(tmp_path / "view.h5", "view")
    assert isinstance(matrix._open().reader, LibraryReader)
    np.testing.assert_array_equal(matrix[:], expected)


@pytest.mark.parametrize("missing", ["nowhere", "other type"])
def test_sources_that_are_not_as_the_view_says(tmp_path, missing):
    """HDF5 puts fill values, or converts: it is asked."""
    with h5py.File(tmp_path / "view.h5", "w") as file:
        file["other type"] = ARRAYS["a"].astype("i8")
        layout = h5py.VirtualLayout((50, 6), "f4")
        layout[:] = h5py.VirtualSource(".", missing, (50, 6), "f4" if missing != "other type" else "i8")
        file.create_virtual_dataset("view", layout, fillvalue=-1)
    with h5py.File(tmp_path / "view.h5") as file:
        expected = file["view"][:]
    np.testing.assert_array_equal(HDF5Matrix(tmp_path / "view.h5", "view")[:], expected)


def test_sources_in_other_files_that_are_trusted(tmp_path):
    with h5py.File(tmp_path / "sources.h5", "w") as file:
        write_sources(file)
    with h5py.File(tmp_path / "view.h5", "w") as file:
        array = write_view(file, RUNS[:3], other="sources.h5")
    with pytest.raises(DataError, match="reads another file"):
        HDF5Matrix(tmp_path / "view.h5", "view")
    matrix = HDF5Matrix.trusting(tmp_path / "view.h5", "view")
    assert isinstance(matrix._open().reader, ViewReader)
    np.testing.assert_array_equal(matrix[:], array)
    pid = os.fork()
    if pid == 0:
        os._exit(int(not np.array_equal(matrix[5:60], array[5:60])))
    assert os.waitpid(pid, 0)[1] == 0
    with h5py.File(tmp_path / "new.h5", "w") as file:
        for name in ARRAYS:
            file.create_dataset(name, data=-ARRAYS[name], **CHUNKED)
    (tmp_path / "new.h5").rename(tmp_path / "sources.h5")
    np.testing.assert_array_equal(matrix[[70, 2]], -array[[70, 2]])
    matrix.close()
    (tmp_path / "sources.h5").unlink()
    np.testing.assert_array_equal(HDF5Matrix.trusting(tmp_path / "view.h5", "view")[:], np.full(array.shape, -1))
