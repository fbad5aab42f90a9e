"""How well an order mixes: how far samples move, and whether batches look like random draws. Reads some thousand labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcutils.data.order import Order
from hpcutils.data.scramble import Ints
from hpcutils.data.shards import EpochOrder

PLACES, PLACE_ROWS = 32, 256
# Labels that take more values than this are put into as many classes of equal size.
MOST_CLASSES = 16
# Where neighbours in the file have the same label so much more often than by chance (0 to 1), the file is sorted.
SORTED = 0.5
# Batches whose labels vary so much more than random draws do are badly mixed.
BADLY_MIXED = 2.0


@dataclass(frozen=True)
class Quality:
    """What was found.

    Args:
        displacement: Mean distance between a sample's place in the file and in the epoch; 1 is that of a random order.
        mixing: How much the labels of a batch vary from batch to batch; 1 is that of random draws, more is worse.
        clustering: How much more often than by chance neighbours in the file have the same label, 0 to 1.
    """

    displacement: float
    mixing: float
    clustering: float

    @property
    def is_sorted(self) -> bool:
        """Whether the file is sorted by label, more or less."""
        return self.clustering > SORTED

    def __str__(self) -> str:
        return f"samples move {self.displacement:.2f} x and labels vary {self.mixing:.2f} x as in a random order"


def measure(order: Order, read_labels: Callable[[Ints], NDArray[Any]], epoch: int = 0) -> Quality:
    """Look at some of the batches of an epoch.

    Args:
        order: Of any rank.
        read_labels: Returns the labels of samples, `(n, ...)`; 1-D, one-hot, or anything whose first element tells.
        epoch: Which epoch.
    """
    sequence = EpochOrder(order.layout, order.seed, epoch, order.shuffle)
    # (places, rows): runs of positions, spread over the epoch.
    count = min(PLACE_ROWS, order.samples)
    starts = np.unique(np.linspace(0, order.samples - count, PLACES).astype(np.int64))
    rows = np.stack([sequence.run(start, start + count).rows for start in starts.tolist()])
    moved = np.abs(rows - starts[:, None] - np.arange(count)).mean() / (order.samples / 3)
    spread = np.linspace(0, max(order.samples - 2, 0), PLACES * PLACE_ROWS).astype(np.int64)
    labels = [_flat(read_labels(part)) for part in (spread, np.minimum(spread + 1, order.samples - 1), rows.reshape(-1))]
    here, next_, batches = _classes(labels)
    share = np.bincount(here, minlength=1) / len(here)
    chance = float((share**2).sum())
    same = float((here == next_).mean())
    clustering = max(0.0, (same - chance) / (1 - chance)) if chance < 1 else 0.0
    return Quality(float(moved), _variation(batches.reshape(rows.shape), share), clustering)


def _flat(labels: NDArray[Any]) -> NDArray[Any]:
    """Return one number a sample."""
    flat = labels.reshape(len(labels), -1)
    one_hot = flat.shape[1] > 1 and bool(((flat != 0).sum(axis=1) == 1).all())
    return flat.argmax(axis=1) if one_hot else flat[:, 0]


def _classes(labels: list[NDArray[Any]]) -> list[Ints]:
    """Return the class of each label, from 0 on: its value, or the part of the range in which it lies."""
    values = np.unique(labels[0])
    if len(values) > MOST_CLASSES:
        values = np.quantile(labels[0], np.linspace(0, 1, MOST_CLASSES + 1)[:-1])
    return [np.clip(np.searchsorted(values, part, side="right") - 1, 0, None) for part in labels]


def _variation(batches: Ints, share: NDArray[np.float64]) -> float:
    """Return the mean of chi squared over its degrees of freedom, for rows of classes."""
    known = np.flatnonzero(share)
    if len(known) < 2:
        return 1.0
    expected = batches.shape[1] * share[known]
    found = np.stack([np.bincount(batch, minlength=len(share))[known] for batch in batches])
    return float((((found - expected) ** 2 / expected).sum(axis=1) / (len(known) - 1)).mean())
