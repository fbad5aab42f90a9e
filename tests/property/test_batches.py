"""User Sequences cut over ranks: every batch once, the same global batches for any world, the true mean, weights included."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcutils.data.batches import BatchOrder
from hpcutils.data.order import Certificate, Seat, certificate_of
from hpcutils.errors import DataError
from hpcutils.train.pipeline import Form, form_of
from hpcutils.train.sequences import SequenceFeed
from hpcutils.train.workers import Workers


class Whole:
    """The batches of a Sequence, and all of its samples: x is the sample's number, y a random value."""

    def __init__(self, batches: int, rows: int, last_rows: int, weighted: bool) -> None:
        self.batches, self.rows, self.last_rows = batches, rows, last_rows
        self.samples = (batches - 1) * rows + last_rows
        self.x = np.arange(self.samples)
        draw = np.random.default_rng(self.samples)
        self.y, self.weight = draw.normal(size=self.samples), draw.uniform(0, 2, self.samples)
        self.weighted = weighted

    def __getitem__(self, number: int):
        part = slice(number * self.rows, (number + 1) * self.rows)
        return (self.x[part], self.y[part], self.weight[part]) if self.weighted else (self.x[part], self.y[part])

    def form(self) -> Form:
        return form_of(self[0], "pipeline.py:make")

    # As a maker and as a rank's copy.
    def make(self, which: str, epoch: int, number: int):
        return self[number]

    def begin(self, epoch: int) -> None: ...

    def close(self) -> None: ...


@st.composite
def plans(draw):
    """A Sequence, the orders of all ranks, and an epoch."""
    rows = draw(st.integers(1, 6))
    batches = draw(st.integers(1, 130))
    last_rows = draw(st.integers(1, rows)) if batches > 1 else rows
    ranks, each = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    whole = Whole(batches, rows, last_rows, draw(st.booleans()))
    shuffle, seed = draw(st.booleans()), draw(st.integers(0, 2**32 - 1))
    sizes = (batches, rows, last_rows, each * rows)
    orders = [BatchOrder(*sizes, Seat(ranks=ranks, rank=rank), seed, shuffle) for rank in range(ranks)]
    return whole, orders, draw(st.integers(0, 5))


@given(plans())
def test_every_batch_exactly_once_in_equal_steps_and_the_small_one_last(plan):
    whole, orders, number = plan
    assert len({(order.steps, order.local_rows, order.name()) for order in orders}) == 1
    epochs = [order.epoch(number) for order in orders]
    steps = [[epoch.cut(step) for epoch in epochs] for step in range(orders[0].steps)]
    taken = np.concatenate([cut.numbers for cuts in steps for cut in cuts])
    assert sorted(taken) == list(range(whole.batches))
    assert whole.batches - 1 in np.concatenate([cut.numbers for cut in steps[-1]])
    certificate = Certificate()
    for cuts in steps:
        for cut in cuts:
            certificate = certificate.add(cut.numbers)
    assert certificate == certificate_of(orders[0].batches)
    sizes = [sum(orders[0].last_rows if n == whole.batches - 1 else whole.rows for c in cuts for n in c.numbers) for cuts in steps]
    assert sizes == [orders[0].batch_samples(step) for step in range(len(steps))]
    assert sum(sizes) == orders[0].samples == whole.samples


@given(plans())
def test_global_batches_do_not_depend_on_the_world(plan):
    _, orders, number = plan
    first = orders[0]
    alone = BatchOrder(first.batches, first.rows, first.last_rows, first.batch_size, Seat(), first.seed, first.shuffle)
    assert alone.name() == first.name()
    epochs, whole = [order.epoch(number) for order in orders], alone.epoch(number)
    for step in range(first.steps):
        joined = np.concatenate([epoch.cut(step).numbers for epoch in epochs])
        np.testing.assert_array_equal(joined, whole.cut(step).numbers)


@given(plans(), st.data())
def test_what_ranks_feed_has_the_mean_of_the_global_batch(plan, data):
    whole, orders, number = plan
    first_step = data.draw(st.integers(0, orders[0].steps - 1))
    form = whole.form()
    workers = Workers([whole])
    feeds = [SequenceFeed("all", whole, form, order, workers, "threads") for order in orders]
    for feed in feeds:
        feed.begin_epoch(number, first_step)
    seen = []
    for parts in zip(*(feed.batches() for feed in feeds), strict=True):
        assert {len(array) for batch in parts for array in batch} == {orders[0].local_rows}
        rows = np.concatenate([x[weight > 0] for x, _, weight in parts])
        seen.extend(rows)
        real = np.sort(rows)
        assert len(set(real)) == len(real)
        # What Keras computes on each rank: the weighted sum over the rows, divided by their number; padding may be anything.
        mean = np.mean([(y * weight).mean() for _, y, weight in parts])
        expected = (whole.y[real] * (whole.weight[real] if whole.weighted else 1)).mean()
        np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-6)
    workers.close()
    assert len(seen) == whole.samples - first_step * orders[0].batch_size
    certificate = Certificate()
    for feed in feeds:
        for _ in range(first_step, len(feed)):
            feed.used()
        certificate = certificate.join(feed.certificate)
    assert first_step or certificate == certificate_of(orders[0].batches)


@given(st.integers(1, 50), st.integers(1, 500))
def test_a_global_batch_is_made_of_whole_batches(rows, batch_size):
    if batch_size % rows == 0:
        assert BatchOrder(3, rows, 1, batch_size, Seat()).plan.batch_size == batch_size // rows
        return
    with pytest.raises(DataError, match=f"batch_size {batch_size} is no multiple of {rows}") as caught:
        BatchOrder(3, rows, 1, batch_size, Seat())
    named = [int(word) for word in caught.value.hint.split(",")[0].split() if word.isdigit()]
    assert named == [size for size in (batch_size // rows * rows, batch_size // rows * rows + rows) if size]


@pytest.mark.parametrize("last_rows", [0, 6])
def test_the_last_batch_is_not_empty_and_not_larger(last_rows):
    with pytest.raises(DataError, match=f"batch 8, the last one, has {last_rows} rows; from 1 to 5 were expected"):
        BatchOrder(9, 5, last_rows, 10, Seat())
