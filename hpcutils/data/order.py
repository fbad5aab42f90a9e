"""Who reads which sample when: pure arithmetic, no I/O.

The order of an epoch is a function of (seed, epoch, number of samples) alone. It is cut into *global* batches first, and each
global batch over the ranks after that: any number of ranks trains on the same global batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Cut:
    """One rank's part of one global batch.

    Args:
        rows: `(local_rows,)` int64 sample numbers; the padding repeats samples of the same batch.
        weights: `(local_rows,)` float32; 0 for padding. Real rows weigh so that the mean over ranks of each rank's mean loss is
            the mean over the samples of the global batch.
        real: How many of `rows`, from the first, are this rank's own samples.
    """

    rows: Rows
    weights: NDArray[np.float32]
    real: int


@dataclass(frozen=True)
class Order:
    """The plan of all epochs for one rank.

    Args:
        samples: Size of the dataset.
        batch_size: Samples of a full global batch.
        world_size: Number of ranks.
        rank: This one.
        seed: Of the shuffle.
        shuffle: Whether epochs are permuted (validation is not).
    """

    samples: int
    batch_size: int
    world_size: int = 1
    rank: int = 0
    seed: int = 0
    shuffle: bool = True

    @property
    def steps(self) -> int:
        """Global batches of an epoch; every rank takes all of them."""
        return -(-self.samples // self.batch_size)

    @property
    def local_rows(self) -> int:
        """Rows of each local batch, the last one included: shapes never change."""
        return -(-self.batch_size // self.world_size)

    def batch_samples(self, step: int) -> int:
        """Return the number of samples in a global batch: `batch_size` for all but perhaps the last."""
        return min(self.batch_size, self.samples - step * self.batch_size)

    def weight(self, step: int) -> float:
        """Return what a real row of global batch `step` weighs, so that the mean of the ranks' mean losses is the batch's mean."""
        return self.world_size * self.local_rows / self.batch_samples(step)

    def permutation(self, epoch: int) -> Rows:
        """Return the order of an epoch: `(samples,)` int64."""
        if not self.shuffle:
            return np.arange(self.samples, dtype=np.int64)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
        return generator.permutation(self.samples)

    def cut(self, permutation: Rows, step: int) -> Cut:
        """Return this rank's part of global batch `step` of the epoch in `permutation`."""
        batch = permutation[step * self.batch_size : (step + 1) * self.batch_size]
        first = self.rank * self.local_rows
        real = min(max(len(batch) - first, 0), self.local_rows)
        # Padding takes real samples of the same batch, never zeros: a loss that is not finite at zero would turn 0 * inf into NaN.
        rows = batch[np.arange(first, first + self.local_rows) % len(batch)]
        weights = np.zeros(self.local_rows, np.float32)
        weights[:real] = self.weight(step)
        return Cut(rows, weights, real)

    def digest(self) -> tuple[Any, ...]:
        """Return what all ranks must agree on before the first step."""
        first = self.permutation(0)
        return (self.samples, self.batch_size, self.world_size, self.steps, self.seed, int(mixed(first[:1024]).sum()))


def mixed(rows: Rows) -> NDArray[np.uint64]:
    """Return a well-spread 64-bit hash of each sample number (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        bits = rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return bits ^ (bits >> np.uint64(31))


@dataclass(frozen=True)
class Certificate:
    """What is known of a multiset of samples without keeping it: count, sum and xor of their hashes (mod 2^64)."""

    count: int = 0
    total: int = 0
    xor: int = 0

    def add(self, rows: Rows) -> Certificate:
        """Return the certificate with `rows` added."""
        hashes = mixed(rows)
        total = (self.total + int(hashes.sum(dtype=np.uint64))) % 2**64
        xor = self.xor ^ int(np.bitwise_xor.reduce(hashes)) if len(rows) else self.xor
        return Certificate(self.count + len(rows), total, xor)

    def join(self, other: Certificate) -> Certificate:
        """Return the certificate of both multisets together."""
        return Certificate(self.count + other.count, (self.total + other.total) % 2**64, self.xor ^ other.xor)


def certificate_of(samples: int, block: int = 1 << 20) -> Certificate:
    """Return the certificate of a whole dataset, each sample once, in constant memory."""
    certificate = Certificate()
    for start in range(0, samples, block):
        certificate = certificate.add(np.arange(start, min(start + block, samples), dtype=np.int64))
    return certificate
