"""How a job's data is read: the choice between memory, windows and neither; what Keras may and may not do to a feed."""

import h5py
import numpy as np
import pytest

from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.order import Certificate, Order, Seat, certificate_of
from hpcutils.data.shards import POOL_BYTES, Layout
from hpcutils.data.windows import layout_of, window_bytes
from hpcutils.errors import DataError
from hpcutils.log import LOGGER
from hpcutils.train.feed import RowFeed
from hpcutils.train.ranks import Ranks
from hpcutils.train.reading import RowSource, agree, open_source, plan_reading, seats
from hpcutils.train.session import look_at_mixing, memory_of
from hpcutils.train.steps import held_bytes
from hpcutils.world import World

ROWS = 50


@pytest.fixture
def path(tmp_path):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file.create_dataset("x", data=np.arange(ROWS * 4, dtype=">u2").reshape(ROWS, 4), chunks=(8, 4), compression="gzip")
        file["y"] = np.arange(ROWS) % 3
        file["short"] = np.arange(ROWS - 1)
    return tmp_path / "data.h5"


@pytest.fixture
def matrices(path):
    with HDF5Matrix(path, "x", 3) as x, HDF5Matrix(path, "y", 3) as y:
        yield x, y


def feed_of(matrices, **more) -> RowFeed:
    x, y = matrices
    return RowFeed(RowSource(x, y, None, True), Order(layout_of(x), 8, seed=2), **more)


def test_what_fits_is_in_memory(matrices):
    x, y = matrices
    order = Order(layout_of(x), 8)
    assert plan_reading(x, y, order, None, "window", x.nbytes + y.nbytes)[0].mode == "memory"
    plan, short = plan_reading(x, y, order, None, "independent", 1 << 30, 128 << 20)
    assert (plan.mode, plan.memory_bytes, plan.cache_bytes, short) == ("independent", 0, 128 << 20, None)
    assert str(plan) == "independent (6 shards, 0.0 MiB a node, up to 128 MiB of chunks a rank)"


def test_what_does_not_fit_is_read_in_windows_or_by_each_rank(matrices):
    x, y = matrices
    order = Order(layout_of(x), 8, Seat(ranks=4, rank=3))
    plan, short = plan_reading(x, y, order, Seat(3, 1, 1, 0), "window", x.nbytes + y.nbytes - 1)
    assert plan.mode == "independent"
    assert plan.order is order
    assert "may take" in short


def test_nodes_own_shards_where_windows_are_read():
    large = Order(Layout(10**6, 64, 0, 12288), 256, Seat(ranks=4, rank=3))
    plan, short = plan_reading(_Sized(12288 * 10**6), _Sized(8 * 10**6), large, Seat(2, 1, 2, 1), "window", 4 * POOL_BYTES)
    assert (plan.mode, plan.order.seat, plan.y_in_memory, short) == ("window", Seat(2, 1, 2, 1), True, None)
    by_seven = Seat(7, 1, 2, 1)
    assert plan_reading(_Sized(12288 * 10**6), _Sized(8), large, by_seven, "window", 4 * POOL_BYTES)[0].order.seat == large.seat


def test_data_that_arrives_is_read_in_windows_where_they_need_less():
    large = Order(Layout(10**6, 64, 0, 12288), 256, Seat(ranks=4, rank=3))
    x, y = _Sized(12288 * 10**6), _Sized(8 * 10**6)
    plan, short = plan_reading(x, y, large, Seat(2, 1, 2, 1), "window", 1 << 40, arriving=True)
    # Cut by count, as it would be from memory: each rank takes the same samples.
    assert (plan.mode, plan.order.seat, plan.y_in_memory, short) == ("window", large.seat, True, None)
    assert plan_reading(x, y, large, Seat(2, 1, 2, 1), "window", 1 << 40)[0].mode == "memory"
    small, few, labels = Order(Layout(1000, 64, 0, 12288), 256), _Sized(12288 * 1000), _Sized(8 * 1000)
    few.row_bytes = 12288
    assert window_bytes(small, 12288) >= few.nbytes
    assert plan_reading(few, labels, small, None, "window", 1 << 40, arriving=True)[0].mode == "memory"


class _Sized:
    """As much of a matrix as a plan looks at."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.row_bytes = nbytes, nbytes // 10**6


def test_a_rank_alone_has_every_seat():
    assert seats(Ranks(World())) == (Seat(), Seat())


def test_lengths_must_agree(path):
    x, y = HDF5Matrix(path, "x"), HDF5Matrix(path, "short")
    with pytest.raises(DataError, match="x has 50 samples and y has 49"):
        open_source(x, y, Order(layout_of(x), 8), Ranks(World()), "window", 1)


def test_an_epoch_has_each_sample_once_in_the_machines_byte_order(matrices):
    feed = feed_of(matrices, classes=3)
    feed.begin_epoch(1)
    batches = list(feed.batches())
    assert len(batches) == len(feed) == 6
    assert feed.certificate == Certificate(), "made is not used"
    for _ in batches:
        feed.used()
    assert feed.certificate == certificate_of(ROWS - 3)
    rows = np.concatenate([x[w > 0, 0] // 4 for x, _, w in batches])
    assert sorted(rows) == list(range(3, ROWS))
    x, y, weights = batches[0]
    assert x.dtype.isnative
    assert (x.shape, y.shape, weights.shape) == ((8, 4), (8, 3), (8,))
    np.testing.assert_array_equal(y.argmax(axis=1), x[:, 0] // 4 % 3)


def test_who_looks_before_the_epoch_takes_nothing_of_it(matrices):
    feed = feed_of(matrices)
    early = feed.batches()
    x, _, weights = next(early)
    assert (x[:, 0] == 12).all()
    assert not weights.any()
    feed.begin_epoch(0)
    next(early)
    with pytest.raises(IndexError):
        feed.used()
    old = feed.batches()
    next(old)
    feed.begin_epoch(1)
    assert list(old) == [], "an iterator of an epoch that is over ends"
    for _ in feed.batches():
        feed.used()
    assert feed.certificate == certificate_of(ROWS - 3)


def test_normalizers_see_batches_of_the_files_type(matrices):
    seen = []
    feed = feed_of(matrices, normalizer=lambda batch: (seen.append(batch.dtype), batch.astype("f4") / 2)[1])
    feed.begin_epoch(0)
    x, _, _ = next(feed.batches())
    assert seen == [np.dtype(">u2")]
    assert x.dtype == np.float32


class Two:
    """Two ranks, the other of which says what it is told to."""

    def __init__(self, change) -> None:
        self.change = change

    def gather(self, value):
        return [value, self.change(value)]


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: ("window", *plan[1:]),
        lambda plan: (plan[0], plan[1] + 1, *plan[2:]),
        lambda plan: (*plan[:-3], "another order", *plan[-2:]),
        lambda plan: (*plan[:-1], ((51,), "<i4")),
    ],
    ids=["mode", "samples", "order", "labels"],
)
def test_ranks_that_plan_differently_are_an_error(matrices, change):
    x, y = matrices
    plan, _ = plan_reading(x, y, Order(layout_of(x), 8), None, "window", 1 << 30)
    agree(plan, (x, y), Two(lambda own: own))
    with pytest.raises(DataError, match=r"rank 1 plans .* rank 0 plans"):
        agree(plan, (x, y), Two(change))


@pytest.mark.parametrize(
    ("labels", "chunk_rows", "said"),
    [
        (np.arange(20_000) // 2000, 10, ["neighbours share theirs"]),
        (np.arange(20_000) // 2000, 5000, ["neighbours share theirs; windows mix them too little"]),
        (np.random.default_rng(0).integers(0, 10, 20_000), 10, []),
    ],
    ids=["sorted", "sorted in large chunks", "mixed"],
)
def test_files_that_are_sorted_by_label_are_warned_of(tmp_path, caplog, labels, chunk_rows, said):
    with h5py.File(tmp_path / "labels.h5", "w") as file:
        file["y"] = labels
    order = Order(Layout(len(labels), chunk_rows, 0, POOL_BYTES // 8000), 200)
    with HDF5Matrix(tmp_path / "labels.h5", "y") as y, caplog.at_level("INFO", logger=LOGGER.name):
        look_at_mixing(order, y)
    assert "samples move" in caplog.text
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == len(said)
    assert all(words in line for words, line in zip(said, warned, strict=True))
    if len(said) and "windows" not in said[0]:
        assert "windows" not in warned[0]


def test_the_plan_states_all_memory(matrices):
    x, y = matrices
    feed = feed_of(matrices)
    size = 8 * (4 * 2 + y.dtype.itemsize + 4)
    assert held_bytes(feed) == 3 * 16 * size
    assert held_bytes(feed, feed) == 2 * held_bytes(feed)
    plans = [plan_reading(x, y, feed.order, None, read, 1 << 30, 256 << 20)[0] for read in ("window", "independent")]
    said = memory_of(plans, [feed, feed])
    node = f"{(x.nbytes + y.nbytes) / 2**20:.1f} MiB of a node for data"
    assert said == f"{node}, and of each rank 0.0 MiB for batches, up to 256 MiB for chunks"
    assert "chunks" not in memory_of(plans[:1], [feed])


@pytest.mark.parametrize(("in_memory", "counts"), [(True, [25, 0]), (False, [None, None])])
def test_chunks_that_cut_rows_are_counted_as_the_file_has_them(tmp_path, in_memory, counts):
    with h5py.File(tmp_path / "cut.h5", "w") as file:
        file.create_dataset("x", data=np.zeros((20, 4, 6)), chunks=(5, 2, 2), compression="gzip")
        file["y"] = np.zeros(20)
    with HDF5Matrix(tmp_path / "cut.h5", "x") as x, HDF5Matrix(tmp_path / "cut.h5", "y") as y:
        source = RowSource(x, y, None, in_memory)
        assert source.chunks == 24 + 1, "y is one piece"
        assert [source.chunks_read(epoch) for epoch in range(2)] == counts
