"""Kill and go on: at any step, with any worlds, the union of what was seen is the dataset."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcutils.data.order import Certificate, Order, Seat, certificate_of
from hpcutils.data.shards import Layout
from hpcutils.data.state import DataState, state_at
from hpcutils.errors import DataError


@settings(max_examples=25)
@given(
    samples=st.integers(1, 200),
    chunk_rows=st.integers(1, 12),
    batch_size=st.integers(1, 40),
    worlds=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
)
def test_the_union_over_all_worlds_is_exact(samples, chunk_rows, batch_size, worlds, data):
    layout = Layout(samples, chunk_rows)
    state = state_at(Order(layout, batch_size, seed=8), 2, 0, "digest", Certificate())
    seen: list[int] = []
    for number, world in enumerate([*worlds, 3]):
        orders = [Order(layout, batch_size, Seat(ranks=world, rank=rank), 8) for rank in range(world)]
        state = DataState.from_json(state.to_json())
        assert state.epoch == 2
        first = state.resume(orders[0], "digest")
        last = orders[0].steps if number == len(worlds) else data.draw(st.integers(first, orders[0].steps))
        certificate = state.seen
        for order in orders:
            plan = order.epoch(state.epoch)
            for step in range(first, last):
                cut = plan.cut(step)
                seen += cut.rows[: cut.real].tolist()
                certificate = certificate.add(cut.rows[: cut.real])
        if last == orders[0].steps:
            break
        state = state_at(orders[0], 2, last, "digest", certificate)
    assert sorted(seen) == list(range(samples))
    assert certificate == certificate_of(samples)


def test_it_is_small_and_names_the_next_epoch():
    order = Order(Layout(10**9, 64, 0, 12288), 256, seed=2**32 - 1)
    state = state_at(order, 41, order.steps // 2, "a" * 64, Certificate(2**40, 2**64 - 1, 2**64 - 1))
    assert len(state.to_json()) < 400
    assert state_at(order, 41, order.steps, "a", Certificate()).epoch == 42


@pytest.mark.parametrize(
    "order, data, said",
    [
        (Order(Layout(100, 4), 10, seed=2), "d", "seed was 1 and is 2"),
        (Order(Layout(100, 4), 20, seed=1), "d", "batch_size was 10 and is 20"),
        (Order(Layout(100, 5), 10, seed=1), "d", "order was"),
        (Order(Layout(100, 4), 10, seed=1), "e", "data was 'd' and is 'e'"),
    ],
)
def test_another_order_cannot_go_on(order, data, said):
    state = state_at(Order(Layout(100, 4), 10, seed=1), 0, 3, "d", Certificate())
    with pytest.raises(DataError, match=said):
        state.resume(order, data)


@pytest.mark.parametrize(
    "order, data, said",
    [
        (Order(Layout(100, 4), 10, seed=2), "d", "seed was 1 and is 2"),
        (Order(Layout(100, 4), 10, seed=1), "e", "data was 'd' and is 'e'"),
    ],
)
def test_other_data_cannot_go_on_between_epochs_either(order, data, said):
    state = state_at(Order(Layout(100, 4), 10, seed=1), 0, 10, "d", Certificate())
    with pytest.raises(DataError, match=f"with epoch 2: {said}"):
        state.resume(order, data)


def test_another_batch_size_may_begin_an_epoch():
    state = state_at(Order(Layout(100, 4), 10, seed=1), 0, 10, "d", Certificate())
    assert state.resume(Order(Layout(100, 4), 30, seed=1), "d") == 0


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"seed": 1, "seen": {}}'])
def test_a_damaged_state_is_an_error(text):
    with pytest.raises(DataError, match="not a state of the data"):
        DataState.from_json(text)


def test_worlds_may_differ_in_the_middle_of_an_epoch():
    """The batches after the place are those that the first world would have had."""
    layout = Layout(123, 5)
    whole = Order(layout, 10, seed=3).epoch(1)
    state = state_at(Order(layout, 10, Seat(ranks=4), 3), 1, 7, "d", Certificate())
    for step in range(state.resume(Order(layout, 10, Seat(ranks=3), 3), "d"), 13):
        cuts = [Order(layout, 10, Seat(ranks=3, rank=rank), 3).epoch(1).cut(step) for rank in range(3)]
        joined = np.concatenate([cut.rows[: cut.real] for cut in cuts])
        alone = whole.cut(step)
        np.testing.assert_array_equal(joined, alone.rows[: alone.real])
