"""HDF5Matrix against numpy: every kind of key, part, layout and normalizer gives numpy's array, or numpy's kind of error."""

import math
import warnings

import h5py
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcutils.data.chunks import Inflated, take_rows
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.keys import group_rows, split_runs
from hpcutils.data.mixing import MixedOrder

ROWS = 37
ROW_SHAPE = (5, 6)
TRIED = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEWER = settings(TRIED, max_examples=100)

GZIP = {"chunks": (8, *ROW_SHAPE), "compression": "gzip"}
SHUFFLED = {**GZIP, "shuffle": True}
LAYOUTS = {
    "contiguous": {},
    "chunked": {"chunks": (8, *ROW_SHAPE)},
    "one row a chunk": {"chunks": (1, *ROW_SHAPE), "compression": "gzip"},
    "gzip": GZIP,
    "gzip shuffle": SHUFFLED,
    "shuffle": {"chunks": (8, *ROW_SHAPE), "shuffle": True},
    "split rows": {"chunks": (7, 3, 4), "compression": "gzip", "shuffle": True},
    "larger than the data": {"chunks": (64, 8, 8), "maxshape": (None, 8, 8), "compression": "gzip", "shuffle": True},
    "lzf": {"chunks": (8, *ROW_SHAPE), "compression": "lzf"},
    "fletcher32": {"chunks": (8, *ROW_SHAPE), "fletcher32": True},
    "scaleoffset": {"chunks": (8, *ROW_SHAPE), "scaleoffset": 0, "dtype": "i4"},
}
DTYPES = ["f4", ">f4", "f8", "f2", "u1", "i2", ">i8", "?", "S3", "c8", np.longdouble]
NORMALIZERS = {
    "none": None,
    "halved": lambda rows: rows.astype("f4") / 2,
    "flat": lambda rows: rows.reshape(len(rows), math.prod(rows.shape[1:])),
    "in place": lambda rows: np.multiply(rows, 2, out=rows),
    "one number a row": lambda rows: rows[:, 0, 0],
    "an axis more": lambda rows: rows[..., None],
}


class Arrays(dict):
    def __repr__(self):
        return f"{len(self)} arrays"  # hypothesis prints its arguments


def numbers(dtype, shape=(ROWS, *ROW_SHAPE)):
    values = np.random.default_rng(7).integers(0, 100, shape)
    return values.astype(dtype)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file with many datasets, and the arrays that they should equal."""
    path = tmp_path_factory.mktemp("matrix") / "all.h5"
    arrays = Arrays()
    with h5py.File(path, "w") as file:
        for name, options in LAYOUTS.items():
            arrays[name] = numbers(options.get("dtype", "f4"))
            file.create_dataset(name, data=arrays[name], **{**options, "dtype": None})
        for dtype in DTYPES:
            for kind, options in (("gzip shuffle", SHUFFLED), ("contiguous", {})):
                name = f"{kind} {np.dtype(dtype).str}"
                arrays[name] = numbers(dtype)
                file.create_dataset(name, data=arrays[name], **options)
        for name, shape in (("1-D", (ROWS,)), ("2-D", (ROWS, 4)), ("no rows", (0, 4)), ("empty rows", (9, 0))):
            arrays[name] = numbers("i4", shape)
            chunks = tuple(max(1, n // 3) for n in shape)
            file.create_dataset(name, data=arrays[name], chunks=chunks, maxshape=(None,) * len(shape), shuffle=True)
        holes = file.create_dataset("holes", (ROWS, *ROW_SHAPE), "f4", fillvalue=-3, **SHUFFLED)
        holes[17:20] = 5
        arrays["holes"] = holes[:]
    with h5py.File(path, "r") as file:  # the arrays are what h5py itself gives back, types included
        for name in arrays:
            assert np.array_equal(file[name][()], arrays[name])
    return path, arrays


def answer(call):
    """Return the value of `call()`, or the kind of error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return call()
        except (IndexError, TypeError, ValueError) as exc:
            return type(exc)
        except DeprecationWarning as exc:  # numpy announces that it will refuse such a key
            assert "Out of bound index" in str(exc)
            return IndexError


def assert_same(ours, theirs, rows=None):
    """Compare two answers; `rows` is the length of the array where the key may hold a row number that is out of range."""
    if rows == 0 and ours is IndexError and isinstance(theirs, np.ndarray) and theirs.size == 0:
        return  # an array without rows lets such a number pass when nothing is picked (`x[[0], []]`); ours never does
    if isinstance(ours, type) or isinstance(theirs, type):
        assert ours is theirs
        return
    assert np.shape(ours) == np.shape(theirs)
    assert np.asarray(ours).dtype == np.asarray(theirs).dtype
    assert isinstance(ours, np.ndarray) == isinstance(theirs, np.ndarray)
    np.testing.assert_array_equal(ours, theirs)


def index_arrays(size):
    indices = st.integers(-size - 1, size) if size else st.integers(-1, 1)
    return st.one_of(
        hnp.arrays(np.int64, st.integers(0, 9), elements=indices),
        hnp.arrays(np.int32, hnp.array_shapes(max_dims=2, max_side=3), elements=indices),
        hnp.arrays(np.uint64, st.integers(0, 5), elements=st.integers(0, max(size - 1, 0))),
    )


def row_items(size):
    """One element of a key, for an axis of `size`; some are wrong on purpose."""
    ints = st.integers(-size - 1, size)
    return st.one_of(
        ints,
        ints.map(np.int16),
        ints.map(np.array),
        st.slices(size),
        st.builds(slice, st.none() | ints, st.none() | ints, st.sampled_from([None, -1, 1, 2, -3, 7, 0])),
        st.lists(ints, max_size=6),
        index_arrays(size),
        hnp.arrays(bool, st.sampled_from([size, size, size, size + 1, 0])),
        st.sampled_from([None, Ellipsis, True, False, 1.5, "a", np.array([0.5]), [[0], [1, 2]], [None], slice("a")]),
    )


@st.composite
def keys(draw, shape):
    kind = draw(st.sampled_from(["one", "tuple", "basic", "mask"]))
    if kind == "one":
        return draw(row_items(shape[0]))
    if kind == "basic":
        return draw(hnp.basic_indices(shape, allow_newaxis=True, allow_ellipsis=True))
    if kind == "mask":
        mask = draw(hnp.arrays(bool, shape[: draw(st.integers(1, len(shape)))]))
        return (None, mask) if draw(st.booleans()) else mask
    sizes = draw(st.lists(st.sampled_from(shape), max_size=len(shape)))
    return tuple(draw(row_items(size)) for size in (shape[: len(sizes)] if draw(st.booleans()) else sizes))


@st.composite
def parts(draw, rows):
    start = draw(st.integers(-rows, rows))
    end = draw(st.none() | st.integers(-rows, rows))
    return start, end


def check(data, draw, name, normalizer):
    path, arrays = data
    array = arrays[name]
    start, end = draw(parts(len(array)))
    with HDF5Matrix(path, name, start, end, normalizer) as matrix:
        expected = array[start:end].copy()
        if normalizer is not None:
            expected = normalizer(expected)
        assert (matrix.shape, matrix.dtype, matrix.ndim) == (expected.shape, expected.dtype, expected.ndim)
        assert (matrix.size, matrix.nbytes, len(matrix)) == (expected.size, expected.nbytes, len(expected))
        for _ in range(3):
            key = draw(keys(expected.shape))
            assert_same(answer(lambda key=key: matrix[key]), answer(lambda key=key: expected[key]), len(expected))


@TRIED
@given(drawn=st.data(), name=st.sampled_from(sorted({*LAYOUTS, "1-D", "2-D", "no rows", "empty rows", "holes"})))
def test_every_key_means_what_numpy_says(data, drawn, name):
    check(data, drawn.draw, name, None)


@FEWER
@given(drawn=st.data(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(["gzip shuffle", "contiguous"]))
def test_every_type_of_number(data, drawn, dtype, layout):
    check(data, drawn.draw, f"{layout} {np.dtype(dtype).str}", None)


@FEWER
@given(drawn=st.data(), layout=st.sampled_from(sorted(LAYOUTS)), normalizer=st.sampled_from(sorted(NORMALIZERS)))
def test_the_normalizer_sees_a_batch_axis(data, drawn, layout, normalizer):
    check(data, drawn.draw, layout, NORMALIZERS[normalizer])


@FEWER
@given(drawn=st.data(), layout=st.sampled_from(sorted(LAYOUTS)))
def test_read_rows_takes_any_rows_in_any_order(data, drawn, layout):
    path, arrays = data
    rows = drawn.draw(hnp.arrays(np.int64, st.integers(0, 60), elements=st.integers(-30, 29)))
    with HDF5Matrix(path, layout, 5, 35) as matrix:
        np.testing.assert_array_equal(matrix.read_rows(rows), arrays[layout][5:35][rows])


@pytest.mark.parametrize("key", [[], (), np.array([], int), np.zeros(ROWS, bool), slice(3, 3), (slice(0), 2)], ids=repr)
def test_keys_that_pick_nothing_or_all(data, key):
    path, arrays = data
    with HDF5Matrix(path, "gzip shuffle", normalizer=NORMALIZERS["halved"]) as matrix:
        assert_same(matrix[key], NORMALIZERS["halved"](arrays["gzip shuffle"])[key])


EMPTY_MASKS = [
    np.zeros(0, bool),
    np.zeros((0, 5), bool),
    np.zeros((0, 5, 6), bool),
    (np.zeros(0, bool), slice(None)),
    (Ellipsis, np.zeros(0, bool)),
    (slice(None), np.zeros(0, bool)),
    (None, np.zeros(0, bool)),
    (np.zeros(0, bool), 3),
    (np.zeros(0, bool), 7),
    (np.zeros(0, bool), [1, 2]),
    np.zeros((0, 4), bool),
    np.zeros((0, 0), bool),
    [True] * 0,
]


@pytest.mark.parametrize("key", EMPTY_MASKS, ids=str)
@pytest.mark.parametrize("name", ["gzip shuffle", "contiguous", "no rows"])
def test_masks_without_elements(data, key, name):
    path, arrays = data
    with HDF5Matrix(path, name) as matrix:
        assert_same(answer(lambda: matrix[key]), answer(lambda: arrays[name][key]))


@FEWER
@given(drawn=st.data())
def test_keys_answered_in_pieces(data, drawn, monkeypatch):
    path, arrays = data
    monkeypatch.setattr("hpcutils.data.hdf5.PIECE_BYTES", 400)  # three rows
    key = drawn.draw(keys(arrays["gzip"].shape))
    with HDF5Matrix(path, "gzip") as matrix:
        assert_same(answer(lambda: matrix[key]), answer(lambda: arrays["gzip"][key]))


@FEWER
@given(
    rows=st.lists(st.integers(0, 99), max_size=50),
    chunk_rows=st.integers(1, 40),
    step=st.sampled_from([-3, -1, 1, 2]),
    as_range=st.booleans(),
)
def test_groups_visit_each_chunk_once_and_each_row_as_asked(rows, chunk_rows, step, as_range):
    wanted = range(*sorted(rows[:2])[:: step // abs(step)], step) if as_range and len(rows) > 1 else np.array(rows, np.intp)
    out = np.full(len(wanted), -1)
    groups = group_rows(wanted, chunk_rows)
    for group in groups:
        out[group.place] = (np.arange(chunk_rows) + group.chunk * chunk_rows)[group.local]
    assert out.tolist() == list(wanted)
    assert [group.chunk for group in groups] == sorted({row // chunk_rows for row in wanted})


@FEWER
@given(st.lists(st.integers(0, 500), min_size=1, max_size=60), st.integers(0, 20), st.integers(1, 50))
def test_runs_cover_all_rows_and_stay_small(rows, max_gap, max_rows):
    ordered = np.sort(np.array(rows))
    runs = split_runs(ordered, max_gap, max_rows)
    assert [int(row) for low, high in runs for row in ordered[low:high]] == ordered.tolist()
    for low, high in runs:
        assert ordered[high - 1] - ordered[low] < max_rows
        assert (np.diff(ordered[low:high]) <= max_gap + 1).all()


@FEWER
@given(
    array=hnp.arrays(
        st.sampled_from(["u1", "<i2", ">f4", "<f8"]), st.tuples(st.integers(1, 6), st.integers(1, 7)), elements=st.integers(0, 99)
    ),
    drawn=st.data(),
)
def test_unshuffled_rows(array, drawn):
    planes = np.ascontiguousarray(array.view("u1").reshape(-1, array.itemsize).T).tobytes()
    rows = drawn.draw(hnp.arrays(np.intp, st.integers(1, 9), elements=st.integers(0, len(array) - 1)))
    np.testing.assert_array_equal(take_rows(Inflated(planes, True), array.shape, array.dtype, rows), array[rows])
    np.testing.assert_array_equal(take_rows(Inflated(array.tobytes(), False), array.shape, array.dtype, rows), array[rows])


@FEWER
@given(
    rows=st.integers(0, 300),
    chunk_rows=st.integers(1, 50),
    first=st.integers(0, 49),
    window=st.integers(1, 200),
    seed=st.integers(0, 2**40),
    batch=st.integers(1, 70),
)
def test_a_mixed_order_takes_each_row_once(rows, chunk_rows, first, window, seed, batch):
    order = MixedOrder(rows, chunk_rows, first % chunk_rows, window, seed, 3)
    taken = [order.take(start, min(start + batch, rows)) for start in range(0, rows, batch)]
    assert np.sort(np.concatenate([*taken, []])).tolist() == list(range(rows))
    again = MixedOrder(rows, chunk_rows, first % chunk_rows, window, seed, 3)
    assert again.take(0, rows).tolist() == [row for part in taken for row in part]


def test_a_mixed_order_is_made_of_windows_of_whole_chunks():
    def chunks_of(epoch, window_rows):
        rows = MixedOrder(1000, 10, 3, window_rows, 0, epoch).take(0, 1000)
        return rows, (rows + 7) // 10  # the first chunk has 3 rows

    rows, chunks = chunks_of(0, 10)
    assert np.count_nonzero(np.diff(chunks)) == 100, "101 chunks, each left once"
    assert np.count_nonzero(np.diff(rows) != 1) > 700, "the rows of a chunk are shuffled"
    assert not np.array_equal(chunks, chunks_of(1, 10)[1]), "another epoch begins with other chunks"
    rows, chunks = chunks_of(0, 100)
    assert all(len(set(chunks[start : start + 90])) >= 9 for start in (0, 500, 900)), "ten chunks are mixed"
    assert np.count_nonzero(np.diff(chunks)) > 500
