"""Hashes and keyed permutations of whole numbers, made of integer arithmetic alone.

An order of samples that was recorded once must come out the same with every version of numpy and on every machine, so nothing
here draws from a library's random generator. Up to `TABLE_SIZE` numbers are sorted by their hashes, every permutation alike
likely. Above, a Feistel network over two digits of a number (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002)
needs no table: constant memory whatever the range, and any number's place is known at once.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = "NDArray[np.int64]"
Hashes: TypeAlias = "NDArray[np.uint64]"

ROUNDS = 6
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROUND_STEP = np.uint64(0xD1B54A32D192ED03)
HALF = np.uint64(32)
MASK = (1 << 64) - 1


def mixed(numbers: NDArray[Any]) -> Hashes:
    """Return a well-spread 64-bit hash of each number (splitmix64)."""
    with np.errstate(over="ignore"):
        bits = numbers.astype(np.uint64)
        bits += GOLDEN
        bits ^= bits >> np.uint64(30)
        bits *= np.uint64(0xBF58476D1CE4E5B9)
        bits ^= bits >> np.uint64(27)
        bits *= np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
        return bits


def key_of(*parts: int) -> int:
    """Return a 64-bit key that depends on every part (from 0 to 2^64 - 1) and on their order."""
    key = 0
    for part in parts:
        key = _mixed_one(key ^ _mixed_one(part))
    return key


def _mixed_one(number: int) -> int:
    """Return `mixed` of one number: Python's own integers are 50 times faster here than an array of one."""
    bits = (number + int(GOLDEN)) & MASK
    bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & MASK
    return bits ^ bits >> 31


def table(size: int, key: int) -> Ints:
    """Return a permutation of `[0, size)` as an array, `(size,)`."""
    with np.errstate(over="ignore"):
        hashes = mixed(np.uint64(key) + np.arange(size, dtype=np.uint64) * GOLDEN)
    return np.argsort(hashes, kind="stable")


def tables(keys: Hashes, sizes: Ints, most: int) -> Ints:
    """Return a permutation of `[0, size)` for each key as a row, `(keys, most)`; what follows the first `size` is of no use."""
    numbers = np.arange(most, dtype=np.uint64)
    with np.errstate(over="ignore"):
        hashes = mixed(keys[:, None] + numbers * GOLDEN)
    # A hash that equals the mark of what is beyond the end still comes before it: the sort is stable.
    hashes[numbers >= sizes[:, None].astype(np.uint64)] = MASK
    return np.argsort(hashes, axis=1, kind="stable")


def permute(numbers: Ints, size: int, key: int, inverse: bool = False) -> Ints:
    """Return where the Feistel permutation of `[0, size)` that `key` names takes each number; `inverse` goes the other way.

    Args:
        numbers: `(n,)`, from 0 to `size - 1`.
        size: How many numbers are permuted among themselves, fewer than 2^62.
        key: Which permutation.
        inverse: `permute(permute(x, s, k), s, k, inverse=True)` is `x`.

    Returns:
        `(n,)` int64.
    """
    moved = _walk(np.asarray(numbers, np.int64), size, key, inverse)
    while len(outside := np.flatnonzero(moved >= size)):
        # Cycle walking: a number that left the range is moved on until it is back in it.
        moved[outside] = _walk(moved[outside], size, key, inverse)
    return moved


def _walk(numbers: Ints, size: int, key: int, inverse: bool) -> Ints:
    """Permute the smallest near-square rectangle that holds the range: each digit is turned in its ring by a hash of the other."""
    low = int(np.ceil(np.sqrt(float(size))))
    rings = (low, -(-size // low))
    second, first = np.divmod(numbers, low)
    digits = [first, second]
    for number in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
        turned = number % 2
        by = _hashed(digits[1 - turned], key, number, rings[turned])
        digit = digits[turned] - by if inverse else digits[turned] + by
        digit %= rings[turned]
        digits[turned] = digit
    return np.asarray(digits[0] + digits[1] * low)


def _hashed(digit: Ints, key: int, number: int, ring: int) -> Ints:
    """Return a number from 0 to `ring - 1` for each digit."""
    with np.errstate(over="ignore"):
        salt = np.uint64(key) + np.array([number], np.uint64) * ROUND_STEP
        hashes = mixed(digit.astype(np.uint64) * GOLDEN + salt)
    # The upper half of the hash times the ring's size, without a division.
    return ((hashes >> HALF) * np.uint64(ring) >> HALF).astype(np.int64)
