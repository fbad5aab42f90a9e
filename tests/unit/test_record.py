"""What an epoch's proof is worth: a feed that loses, repeats or withholds samples ends the job."""

import h5py
import keras
import numpy as np
import pytest

from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.order import Order
from hpcutils.data.windows import layout_of
from hpcutils.errors import DataError
from hpcutils.train.feed import RowFeed
from hpcutils.train.ranks import Ranks
from hpcutils.train.reading import RowSource
from hpcutils.train.record import Tally
from hpcutils.world import World

ROWS = 50


@pytest.fixture
def matrices(tmp_path):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"] = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("f4")
        file["y"] = np.arange(ROWS, dtype="f4")
    with HDF5Matrix(tmp_path / "data.h5", "x") as x, HDF5Matrix(tmp_path / "data.h5", "y") as y:
        yield x, y


class Lossy(RowFeed):
    """Loses, or repeats, one sample of one batch."""

    def __init__(self, *args, kind):
        super().__init__(*args)
        self.kind = kind

    def _begin(self, epoch, first_step):
        make = super()._begin(epoch, first_step)

        def make_wrongly(step):
            batch, rows = make(step)
            if step == 2 and self.kind == "lost":
                rows = rows[:-1]
            if step == 2 and self.kind == "twice":
                rows[0] = rows[1]
            return batch, rows

        return make_wrongly


def tally_of(matrices, kind) -> Tally:
    x, y = matrices
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    feed = Lossy(RowSource(x, y, None, True), Order(layout_of(x), 8, seed=2), kind=kind)
    return Tally(model, model.train_step, feed, Ranks(World()), 4)


def run(tally: Tally) -> None:
    for _ in range(0, len(tally.feed), 4):
        tally.runner(None)


@pytest.mark.parametrize("kind, count", [("lost", 49), ("twice", 50)])
def test_an_epoch_without_each_sample_once_is_an_error(matrices, kind, count):
    tally = tally_of(matrices, kind)
    tally.begin(0)
    run(tally)
    with pytest.raises(DataError, match=f"took {count} samples of 50, and not each exactly once"):
        tally.finish()


def test_passes_follow_each_other_and_may_begin_early(matrices):
    tally = tally_of(matrices, "none")
    tally.begin(0)
    for epoch in range(3):
        run(tally)
        assert tally.finish()["loss"] > 0
        tally.begin(epoch + 1)
    assert tally.epoch == 3
    tally.runner.end()
