"""Sorted files are found, good and bad mixing are told apart."""

import numpy as np
import pytest

from hpcutils.data.order import Order
from hpcutils.data.quality import BADLY_MIXED, measure
from hpcutils.data.shards import Layout

SAMPLES = 100_000
SORTED = {
    "classes": np.arange(SAMPLES) * 10 // SAMPLES,
    "one_hot": np.eye(10, dtype="f4")[np.arange(SAMPLES) * 10 // SAMPLES],
    "numbers": np.arange(SAMPLES) / SAMPLES,
}


@pytest.mark.parametrize("kind", SORTED)
def test_sorted_labels_are_seen_and_mixed(kind):
    order = Order(Layout(SAMPLES, 64, 0, 12288), 256)
    quality = measure(order, SORTED[kind].__getitem__)
    assert quality.is_sorted
    assert 0.9 < quality.displacement < 1.1
    assert quality.mixing < BADLY_MIXED


def test_random_labels_are_not_called_sorted():
    labels = np.random.default_rng(0).integers(0, 10, SAMPLES)
    quality = measure(Order(Layout(SAMPLES, 64, 0, 12288), 256), labels.__getitem__)
    assert not quality.is_sorted
    assert 0.8 < quality.mixing < 1.25


@pytest.mark.parametrize("chunk_rows, shuffle", [(64, False), (25_000, True)])
def test_bad_mixing_shows(chunk_rows, shuffle):
    """No shuffle at all; and chunks so large that only one fits into the pool at a time."""
    order = Order(Layout(SAMPLES, chunk_rows, 0, 12288), 256, shuffle=shuffle)
    quality = measure(order, SORTED["classes"].__getitem__)
    assert quality.mixing > 10


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_few_samples(samples):
    quality = measure(Order(Layout(samples, 2), 4), np.zeros(samples).__getitem__)
    assert (quality.mixing, quality.clustering) == (1.0, 0.0)
