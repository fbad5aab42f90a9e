"""Sharding: every sample once, the same global batches for any world, the true mean."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpcutils.data.order import Certificate, Order, certificate_of

SIZES = {"samples": st.integers(1, 200), "batch_size": st.integers(1, 64), "world_size": st.integers(1, 9)}


def orders(samples: int, batch_size: int, world_size: int, **more) -> list[Order]:
    return [Order(samples, batch_size, world_size, rank, **more) for rank in range(world_size)]


@given(**SIZES, seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 5))
def test_every_sample_exactly_once(samples, batch_size, world_size, seed, epoch):
    ranks = orders(samples, batch_size, world_size, seed=seed)
    permutation = ranks[0].permutation(epoch)
    cuts = [order.cut(permutation, step) for order in ranks for step in range(order.steps)]
    taken = np.concatenate([cut.rows[: cut.real] for cut in cuts])
    assert sorted(taken) == list(range(samples))
    certificate = Certificate()
    for cut in cuts:
        certificate = certificate.add(cut.rows[: cut.real])
    assert certificate == certificate_of(samples)


@given(**SIZES)
def test_global_batches_do_not_depend_on_the_world(samples, batch_size, world_size):
    alone = Order(samples, batch_size, seed=3)
    ranks = orders(samples, batch_size, world_size, seed=3)
    permutation = alone.permutation(2)
    for step in range(alone.steps):
        cuts = [order.cut(order.permutation(2), step) for order in ranks]
        assert {len(cut.rows) for cut in cuts} == {ranks[0].local_rows}
        joined = np.concatenate([cut.rows[: cut.real] for cut in cuts])
        expected = alone.cut(permutation, step)
        np.testing.assert_array_equal(joined, expected.rows[: expected.real])


@given(**SIZES)
def test_the_mean_over_ranks_is_the_mean_over_samples(samples, batch_size, world_size):
    values = np.random.default_rng(0).normal(size=samples)
    ranks = orders(samples, batch_size, world_size)
    permutation = ranks[0].permutation(0)
    for step in range(ranks[0].steps):
        cuts = [order.cut(permutation, step) for order in ranks]
        # What Keras computes on each rank: the weighted sum over the rows, divided by their number.
        means = [float((values[cut.rows] * cut.weights).sum() / len(cut.rows)) for cut in cuts]
        batch = permutation[step * batch_size : (step + 1) * batch_size]
        np.testing.assert_allclose(np.mean(means), values[batch].mean(), rtol=1e-5, atol=1e-7)


@given(rows=st.lists(st.integers(0, 1000), max_size=30), cut=st.integers(0, 30))
def test_certificates_join(rows, cut):
    array = np.array(rows, dtype=np.int64)
    assert Certificate().add(array[:cut]).join(Certificate().add(array[cut:])) == Certificate().add(array)


@given(samples=st.integers(2, 300), lost=st.integers(0, 299), twice=st.integers(0, 299))
def test_a_sample_lost_and_another_taken_twice_shows(samples, lost, twice):
    lost, twice = lost % samples, twice % samples
    rows = np.arange(samples)
    rows[lost] = twice
    assert (Certificate().add(rows) == certificate_of(samples)) == (lost == twice)


def test_epochs_and_seeds_differ():
    order = Order(100, 10, seed=1)
    assert not np.array_equal(order.permutation(0), order.permutation(1))
    assert not np.array_equal(order.permutation(0), Order(100, 10, seed=2).permutation(0))
    np.testing.assert_array_equal(order.permutation(4), Order(100, 7, world_size=3, rank=2, seed=1).permutation(4))
