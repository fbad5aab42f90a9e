"""Datasets of several files as one: numpy's rows, each chunk fetched once an epoch, whatever the borders."""

import multiprocessing
import pickle
from unittest.mock import patch

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcutils.data import shards
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.joined import JoinedMatrix, join
from hpcutils.data.node import NodeArray
from hpcutils.data.order import Order, certificate_of
from hpcutils.data.schedule import epoch_order
from hpcutils.data.segments import count_chunks, layout_of, times_fetched
from hpcutils.data.windows import WindowReader
from hpcutils.errors import DataError
from hpcutils.train.reading import ReadPlan, look_at_borders

# Rows of each file, and of its chunks; None is one plain block.
FILES = ((47, 8), (3, 8), (64, 8), (30, 12), (25, None), (0, 8), (8, 8))
ALL, OF_8 = range(len(FILES)), [number for number, (_, chunk) in enumerate(FILES) if chunk == 8]
ROW = np.arange(6)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joined")
    for number, (_, chunk) in enumerate(FILES):
        options = {"chunks": (chunk, 4), "compression": "gzip", "shuffle": True, "maxshape": (None, 6)} if chunk else {}
        with h5py.File(folder / f"{number}.h5", "w") as file:
            file.create_dataset("x", data=array_of(number), **options)
    return [(str(folder / f"{number}.h5"), "x") for number in range(len(FILES))]


def array_of(number):
    rows = np.arange(sum(rows for rows, _ in FILES[:number]), sum(rows for rows, _ in FILES[: number + 1]))
    return (rows[:, None] * 6 + ROW).astype("f4")


@st.composite
def joined(draw, sources, numbers=ALL):
    """Some of the files in any order, any part of them; and all rows that they have, as an array."""
    chosen = draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=6))
    array = np.concatenate([array_of(number) for number in chosen])
    start = draw(st.integers(0, len(array)))
    end = draw(st.none() | st.integers(start, len(array)))
    return join([sources[number] for number in chosen], start, end, HDF5Matrix), array[start:end]


@given(drawn=st.data())
def test_rows_are_those_of_all_files(sources, drawn):
    matrix, array = drawn.draw(joined(sources))
    assert (matrix.shape, matrix.dtype, len(matrix), matrix.nbytes) == (array.shape, array.dtype, len(array), array.nbytes)
    assert sum(segment.rows for segment in matrix.segments) == len(array)
    if len(array):
        wanted = np.array(drawn.draw(st.lists(st.integers(-len(array), len(array) - 1), max_size=20)), np.int64)
        np.testing.assert_array_equal(matrix.read_rows(wanted), array[wanted])
        low = drawn.draw(st.integers(0, len(array)))
        high = drawn.draw(st.integers(low, len(array)))
        np.testing.assert_array_equal(matrix[low:high], array[low:high])
        out = np.empty((high - low, 6), matrix.dtype)
        matrix.read_into(low, out)
        np.testing.assert_array_equal(out, array[low:high])
        np.testing.assert_array_equal(NodeArray(matrix).read_rows(wanted), array[wanted])
    matrix.close()


@settings(max_examples=60)
@given(drawn=st.data())
def test_windows_fetch_each_chunk_of_each_file_once(sources, drawn):
    """Also where a file ends inside of a chunk, or the split begins inside of one."""
    with patch.object(shards, "POOL_BYTES", 24 * drawn.draw(st.sampled_from([1, 30, 90, 10_000]))):
        epoch_order.cache_clear()  # it remembers orders by their layout, and this one has another pool
        matrix, array = drawn.draw(joined(sources, drawn.draw(st.sampled_from([ALL, OF_8]))))
        if not len(array):
            with pytest.raises(DataError, match="no samples"):
                layout_of(matrix)
            return
        layout = layout_of(matrix)
        order = Order(layout, drawn.draw(st.integers(1, 60)), seed=3)
        reader = WindowReader([matrix], order, None, 2)
        for epoch in range(2):
            reader.begin(epoch)
            plan, seen = order.epoch(epoch), []
            for step in range(order.steps):
                cut = plan.cut(step)
                np.testing.assert_array_equal(reader.read(step, cut)[0], array[cut.rows])
                seen.append(cut.rows[: cut.real])
            assert sorted(np.concatenate(seen)) == list(range(len(array)))
            if {segment.chunk_rows for segment in matrix.segments if segment.chunked} == {8}:
                assert times_fetched(layout, matrix) == 1
            if all(segment.chunked for segment in matrix.segments):
                fetched, once = reader.chunks_read(epoch), count_chunks(matrix.segments)
                assert fetched == round(once * times_fetched(layout, matrix))
        reader.close()


def test_other_processes_open_the_files_for_themselves(sources):
    matrix = join(sources[:3], 5, 100, HDF5Matrix)
    rows = np.array([94, 0, 43, 44])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for read in (
            *pool.map(matrix.read_rows, [rows] * 3),
            pickle.loads(pickle.dumps(matrix)).read_rows(rows),
            matrix.read_rows(rows),
        ):
            np.testing.assert_array_equal(read[:, 0], (rows + 5) * 6)


def test_the_order_is_that_of_the_files_joined_where_they_end_with_a_chunk(sources, tmp_path):
    """Two files of whole chunks are in the same order as one file of both: it follows from the chunks alone."""
    parts = [sources[2], sources[6], sources[2]]
    matrix = join(parts, 0, None, HDF5Matrix)
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_dataset("x", data=matrix[:], chunks=(8, 4), compression="gzip")
    alone = HDF5Matrix(tmp_path / "all.h5", "x")
    orders = [Order(layout_of(either), 10, seed=1) for either in (matrix, alone)]
    assert orders[0].name() == orders[1].name()
    assert certificate_of(len(matrix)) == certificate_of(len(alone))


def test_what_does_not_fit_together_is_named(sources, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.zeros((3, 5), "f4")
        file["y"] = np.zeros((3, 6), "f8")
    for name, rows in (("x", r"\(5,\) float32"), ("y", r"\(6,\) float64")):
        with pytest.raises(DataError, match=rf"rows of {rows} in other\.h5:{name} cannot follow rows of \(6,\) float32 in 0\.h5:x"):
            join([sources[0], (str(tmp_path / "other.h5"), name)], 0, None, HDF5Matrix)
    with pytest.raises(DataError, match=r"rows 10 to 51 were asked for, and 0\.h5:x, 1\.h5:x have 50 together"):
        join(sources[:2], 10, 51, HDF5Matrix)
    with pytest.raises(DataError, match=r"no dataset 'z'"):
        join([sources[0], (sources[1][0], "z")], 0, None, HDF5Matrix)
    matrix = join(sources[:3], 0, None, HDF5Matrix)
    assert isinstance(matrix, JoinedMatrix)
    for call in (
        lambda: matrix.read_rows(np.array([114])),
        lambda: matrix.read_into(110, np.empty((5, 6), "f4")),
        lambda: matrix[::2],
    ):
        with pytest.raises(IndexError):
            call()


@pytest.mark.parametrize(
    ("x_rows", "y_rows", "start", "times"),
    [
        (8, 500, 0, 1),
        (8, 500, 5, 1),
        (500, 8, 13, 1),
        (6, 8, 3, 1),
        (8, None, 3, 1),
        (None, 500, 5, 1),
        (99, 500, 0, 1.2),
        (1, 64, 0, 1),
    ],
)
def test_x_and_y_are_read_along_common_borders(tmp_path, x_rows, y_rows, start, times, caplog):
    """y is not in memory; before, each of its 8 chunks of 500 rows was fetched for each of the 500 chunks of x."""
    numbers = np.arange(4000)
    with h5py.File(tmp_path / "data.h5", "w") as file:
        for name, rows, array in (("x", x_rows, np.repeat(numbers[:, None], 8, 1)), ("y", y_rows, numbers)):
            options = {"chunks": (rows, *array.shape[1:]), "compression": "gzip"} if rows else {}
            file.create_dataset(name, data=array, **options)
    x, y = HDF5Matrix(tmp_path / "data.h5", "x", start), HDF5Matrix(tmp_path / "data.h5", "y", start)
    # Of x and y together a piece of 2000 rows, and none of 49,500, has room.
    with patch.object(shards, "POOL_BYTES", 24 * 2000 * 72):
        epoch_order.cache_clear()
        layout = layout_of(x, y)
        order = Order(layout, 64, seed=1)
        reader = WindowReader([x, y], order, None, 1)
        reader.begin(0)
        plan = order.epoch(0)
        for step in range(order.steps):
            cut = plan.cut(step)
            for rows, width in zip(reader.read(step, cut), (8, 1), strict=True):
                np.testing.assert_array_equal(rows.reshape(-1, width)[:, 0], cut.rows + start)
        for number, (matrix, rows) in enumerate(((x, x_rows), (y, y_rows))):
            once = count_chunks(matrix.segments)
            if rows:
                assert reader.chunks_read(0, number) == round(once * times_fetched(layout, matrix))
                assert times_fetched(layout, matrix) <= times
        reader.close()
    plan = ReadPlan("window", False, order, 0)
    look_at_borders(plan, x, y)
    assert ("fetched" in caplog.text) == (times > 1)
    if times > 1:
        assert "the chunks of x are fetched 1.17 times an epoch: those of x have 99 rows, those of y 500" in caplog.text


def test_the_borders_follow_from_the_files_alone(tmp_path):
    """Labels in few large chunks do not make the chunks of the order so large that it has few shards left."""
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file.create_dataset("x", (1 << 20, 3072), "f4", chunks=(64, 3072), compression="gzip")
        file.create_dataset("y", (1 << 20,), "i8", chunks=(1 << 19,), compression="gzip")
    x, y = HDF5Matrix.trusting(tmp_path / "data.h5", "x"), HDF5Matrix(tmp_path / "data.h5", "y")
    assert layout_of(x, y) == layout_of(x)
    assert times_fetched(layout_of(x, y), y) == (1 << 20) // 64 / 2
