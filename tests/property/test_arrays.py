"""to_categorical and normalize against plain numpy."""

import warnings

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcutils.data.arrays import normalize, to_categorical

TRIED = settings(max_examples=120, deadline=None)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)
INTEGERS = ["i1", "u1", "i4", ">i8", "u8", "?"]


@TRIED
@given(
    labels=st.sampled_from([*INTEGERS, "f4", "f8"]).flatmap(
        lambda dtype: hnp.arrays(dtype, SHAPES, elements=st.booleans() if dtype == "?" else st.integers(0, 9))
    ),
    spare=st.integers(0, 600) | st.none(),
    dtype=st.sampled_from(["float32", "float64", "int32", "u1", "bool", ">f2"]),
)
def test_one_hot_is_the_identity_matrix_indexed(labels, spare, dtype):
    if labels.size == 0 and spare is None:
        spare = 0
    classes = None if spare is None else (int(labels.max()) + 1 if labels.size else 0) + spare
    result = to_categorical(labels, classes, dtype)
    squeezed = labels[..., 0] if labels.ndim > 1 and labels.shape[-1] == 1 else labels
    count = int(labels.max()) + 1 if classes is None else classes
    np.testing.assert_array_equal(result, np.eye(count, dtype=dtype)[squeezed.astype(int)])
    assert result.dtype == np.dtype(dtype)
    assert result.shape == (*squeezed.shape, count)


@TRIED
@given(
    labels=hnp.arrays("i8", hnp.array_shapes(max_dims=2, min_side=2, max_side=9), elements=st.integers(-3, 12)),
    classes=st.integers(0, 10),
)
def test_the_first_bad_label_is_named(labels, classes):
    bad = [(tuple(map(int, place)), int(labels[tuple(place)])) for place in np.argwhere((labels < 0) | (labels >= classes))]
    try:
        to_categorical(labels, classes)
    except ValueError as exc:
        place, label = bad[0]
        assert f"label {label} at index {place[0] if len(place) == 1 else place}" in str(exc)
    else:
        assert bad == []


def oracle(x, axis, order):
    """Norms by numpy in float64 at least, one division."""
    wide = x.astype(np.result_type(x.dtype, "f8"))
    norms = np.linalg.norm(np.moveaxis(wide, axis, -1).reshape(-1, x.shape[axis]), order, axis=-1)
    norms[norms == 0] = 1
    shape = [n for i, n in enumerate(x.shape) if i != axis % x.ndim]
    return wide / np.expand_dims(norms.reshape(shape), axis)


@TRIED
@given(
    x=st.sampled_from(["f2", "f4", "f8", ">f4", "i4", "u1", "?", "c8"]).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            hnp.array_shapes(max_dims=3, max_side=7),
            elements=st.booleans() if dtype == "?" else st.integers(0 if dtype == "u1" else -100, 100),
        )
    ),
    axis=st.integers(-3, 2),
    order=st.sampled_from([1, 2, 3, 0.5, np.inf, -np.inf, 0]),
)
def test_normalize_divides_by_the_norm(x, axis, order):
    axis = axis % x.ndim - (x.ndim if axis < 0 else 0)
    before = x.copy()
    result = normalize(x, axis, order)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = oracle(x, axis, order)
    rounding = 2e-3 if x.dtype == np.float16 else 1e-5
    np.testing.assert_allclose(result, expected.astype(result.dtype), rtol=rounding, atol=rounding / 10)
    assert result.shape == x.shape
    assert result.dtype == (np.float64 if x.dtype.kind in "biu" else x.dtype)
    np.testing.assert_array_equal(x, before)
    assert not np.shares_memory(result, x)


@TRIED
@given(hnp.arrays("f4", st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), elements=st.integers(-2, 2)))
def test_large_arrays_are_cut_into_blocks(x):
    tiled = np.tile(x, (1, 1, 10_000 if x.size else 1))
    np.testing.assert_allclose(normalize(tiled, 1), oracle(tiled, 1, 2) if x.size else tiled, rtol=1e-5)


@pytest.mark.parametrize("x", [np.zeros((0, 3)), np.zeros((3, 0)), np.zeros(4, "f4"), [[0.0, 0.0], [3.0, 4.0]]], ids=str)
def test_nothing_and_zeros_stay_what_they_are(x):
    for order in (2, 1, np.inf):
        result = normalize(x, -1, order)
        assert result.shape == np.shape(x)
        assert (result[..., :0] == 0).all() and not np.isnan(result).any()


def test_norms_of_float16_do_not_overflow():
    for order in (1, 2):
        assert np.allclose(normalize(np.full(1000, 100, "f2"), order=order), 1000 ** (-1 / order), rtol=2e-3)


@TRIED
@given(
    x=st.sampled_from([("f4", 32), ("f8", 64)]).flatmap(
        lambda kind: hnp.arrays(
            kind[0],
            hnp.array_shapes(max_dims=2, max_side=5),
            elements=st.floats(width=kind[1], allow_nan=False, allow_infinity=False),
        )
    ),
    axis=st.sampled_from([0, -1]),
    order=st.sampled_from([1, 2, 3, 0.5, np.inf, 0, -np.inf, -1]),
    exponent=st.none() | st.integers(-44, 38),
)
def test_normalize_keeps_the_whole_range(x, axis, order, exponent):
    """The oracle has a wider exponent (float64 for float32, x86's long double for float64) and scales nothing."""
    with np.errstate(all="ignore"):
        if exponent is not None:  # a vector of one magnitude, which is where all terms are lost together
            x = (np.sign(x) * 10.0**exponent * (1 + np.abs(x) % 7)).astype(x.dtype)
            x[~np.isfinite(x)] = 0
        wide = x.astype("f8" if x.dtype == "f4" else np.longdouble)
        expected = oracle(wide, axis, order)
        expected[~np.isfinite(expected) & (order < 0)] = np.inf
        result = normalize(x, axis, order)
        info = np.finfo(x.dtype)
        # Quotients past the range (order < 0) are infinite.
        got, wanted = np.abs(result), np.abs(expected.astype(x.dtype))
        np.testing.assert_allclose(got, wanted, rtol=30 * info.eps, atol=2 * info.smallest_subnormal)
    assert result.dtype == x.dtype


@pytest.mark.parametrize("size", [6.99648003e52, 3e97, 2e-97])
@pytest.mark.parametrize("order", [3, 0.7, -3])
def test_roots_that_are_not_exact(size, order):
    """The third root of 1e158 is off by 31 units in the last place, since 1 / 3 is rounded."""
    np.testing.assert_allclose(normalize(np.array([size]), order=order), [1], rtol=4 * np.finfo("f8").eps)


@pytest.mark.parametrize("dtype", ["f4", "f8", "c8", ">f4"])
def test_huge_and_tiny_vectors_have_unit_length(dtype):
    top = float(np.finfo(dtype).max)
    for size in (3e20, 3e-25, 1e-40, top / 5, 1e-44):
        vectors = np.array([[3, 4], [0, 0], [0, 1], [4, 3]], dtype) * np.array(size, dtype)
        result = np.abs(normalize(vectors))
        rounding = 0.2 if size == 1e-44 and top < 1e100 else 1e-5  # 1e-44 is 7 times the smallest float32
        np.testing.assert_allclose(result, [[0.6, 0.8], [0, 0], [0, 1], [0.8, 0.6]], rtol=rounding)
    np.testing.assert_allclose(normalize(np.full(4, top, dtype)), np.full(4, 0.5), rtol=1e-5)
    np.testing.assert_allclose(normalize(np.full(4, top, dtype), order=1), np.full(4, 0.25), rtol=1e-5)
    np.testing.assert_allclose(normalize(np.full(4, top, dtype), order=0.5), np.full(4, 1 / 16), rtol=1e-5)


def test_infinite_vectors_are_what_numpy_says():
    with np.errstate(invalid="ignore"):
        assert str(normalize(np.array([[np.inf, 1], [np.nan, 1], [3e30, 4e30]], "f4")).tolist()).startswith(
            "[[nan, 0.0], [nan, nan]"
        )


def test_bfloat16_stays_bfloat16():
    x = np.array([[3, 4], [0, 0], [3e20, 4e20]], ml_dtypes.bfloat16)
    for order in (2, 3):
        result = normalize(x, order=order)
        assert result.dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(result.astype("f4"), normalize(x.astype("f4"), order=order), rtol=1e-2)


def test_what_cannot_be_normalized():
    with pytest.raises(np.exceptions.AxisError):
        normalize(np.ones((2, 3)), 2)
    with pytest.raises(np.exceptions.AxisError):
        normalize(5.0)
    with pytest.raises(ValueError, match="takes numbers"):
        normalize(["a"])
    with pytest.raises(TypeError):
        normalize(np.ones(3), 0.5)


@pytest.mark.parametrize(
    ("labels", "classes", "said"),
    [
        ([0, 1.5, 2.5], None, r"label 1.5 at index 1$"),
        ([0, np.nan], None, "label nan at index 1"),
        ([np.inf], None, "label inf at index 0"),
        (-1, 3, r"got label -1$"),
        ([[1], [5]], 5, r"lie from 0 to 4 \(5 classes\), got label 5 at index 1"),
        (["1", "2"], None, "label '1' at index 0"),
        ([1j], None, "labels are whole numbers"),
        ([], None, "give num_classes"),
        ([1], -1, "num_classes is a count"),
        (np.array([2**64 - 1], np.uint64), 10, "label 18446744073709551615 at index 0"),
        ([3, -1, -2], None, r"labels are not negative, got label -1 at index 1$"),
        ([0], 0, r"num_classes is 0, so there is no label, got label 0 at index 0"),
        (np.array([0, 2**64 - 1], np.uint64), None, "label 18446744073709551615 at index 1 asks for 18446744073709551616 classes"),
        ([[0, 2], [2**63 - 1, 1]], None, r"label 9223372036854775807 at index \(1, 0\) asks for"),
        (None, None, r"labels are whole numbers, got None \(NoneType\)$"),
        ([1, None], None, r"got None \(NoneType\) at index 1$"),
        ([[0, 1], [2, None]], 3, r"got None \(NoneType\) at index \(1, 1\)$"),
        ({1, 2}, None, r"got \{1, 2\} \(set\): make a list of it"),
        ((i for i in range(3)), 3, r"\(generator\): make a list of it"),
        (np.array([1, 1.5, "x"], object), 3, r"got 1.5 \(float\) at index 1$"),
        (np.array([1, "x"], object), 3, r"got 'x' \(str\) at index 1$"),
        (np.array([0, 2**70], object), 3, f"label {2**70} at index 1"),
        (np.array([0, 2**70], object), None, f"label {2**70} at index 1 asks for"),
        (np.array([0, -1], object), None, "label -1 at index 1"),
        (np.array([0, float("nan")], object), 3, r"got nan \(float\) at index 1"),
        (np.array([0, np.inf], "f2"), None, "label inf at index 1"),
        (np.array([0, 1.5], "f2"), None, "label 1.5 at index 1"),
        (np.array([(1, 2)], "i4,i4"), None, "labels are whole numbers"),
    ],
    ids=lambda value: str(value)[:30].split(" at 0x")[0],
)
def test_labels_that_are_none(labels, classes, said):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=said):
            to_categorical(labels, classes)


@pytest.mark.parametrize(
    "labels", [[1, 0, 2], np.array([[1], [0], [2]]), [True, np.int8(0), 2.0], [np.float16(1), False, np.uint64(2)]], ids=str
)
def test_objects_that_are_whole_numbers(labels):
    labels = np.array(labels, object)
    assert np.array_equal(to_categorical(labels), to_categorical([1, 0, 2]))
    assert to_categorical(labels, 4).shape == (3, 4)
    assert to_categorical(np.array([], object), 3).shape == (0, 3)


def test_labels_of_float16_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(to_categorical(np.array([1, 0, 2], "f2")), to_categorical([1, 0, 2]))
        assert to_categorical(np.array([2048], "f2")).shape == (1, 2049)


def test_many_classes_and_the_example_of_the_page():
    assert to_categorical([0, 2, 1, 2, 0]).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert to_categorical([0]).dtype == np.float32
    assert to_categorical(3, 5).shape == (5,)
    rows = to_categorical(np.arange(5000), 5000, "u1")  # too many for the identity matrix
    assert rows.sum() == 5000 and (rows.argmax(axis=1) == np.arange(5000)).all()
    long = np.random.default_rng(0).integers(0, 3, 200_000).astype("u1")  # several blocks
    assert np.array_equal(to_categorical(long, 3).argmax(axis=1), long)
    with pytest.raises(TypeError):
        to_categorical([1], 2.5)
