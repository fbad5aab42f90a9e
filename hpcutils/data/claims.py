"""What a dataset claims to hold beside what is stored of it: a file of 2 kB can declare a thousand million pictures.

Such a file costs its reader memory and days of decoding. A dataset is refused when no honest writer can have made so much of so
few bytes: more than `CLAIM_BYTES`, and more than its filters can make of its stored bytes at the very best. Data that was never
written (HDF5 makes up its fill value) has no stored bytes and counts in full.
"""

from __future__ import annotations

import math

import h5py
import numpy as np

# Smaller claims do no harm; larger ones must be paid for in stored bytes. Also the most that one chunk may inflate to.
CLAIM_BYTES = 1 << 30

# How many bytes a filter makes of one at the very best, by its registered number. Deflate: two bits for a match of 258 bytes
# (zlib's technical details). LZF: 3 bytes for 264. LZ4: a byte for 255. Zstandard: 4 bytes for a block of 128 KiB of equal
# bytes (RFC 8878); blosc may have it inside. Shuffles and check sums keep the size.
DEFLATE_BEST, ZSTD_BEST = 1032, 32768
BEST = {1: DEFLATE_BEST, 2: 1, 3: 1, 32000: 88, 32001: ZSTD_BEST, 32004: 255, 32008: ZSTD_BEST, 32015: ZSTD_BEST}


def most_bytes(stored_bytes: int, filters: tuple[int, ...]) -> int:
    """Return what `filters` can make of so many stored bytes at most; one that is not in `BEST` is taken to be deflate."""
    return stored_bytes * math.prod(BEST.get(code, DEFLATE_BEST) for code in filters)


def claimed_bytes(dataset: h5py.Dataset) -> int:
    """Return the bytes that all of a dataset takes in memory."""
    # Python's own numbers: the product of a hostile shape does not fit into 64 bits.
    return math.prod(map(int, dataset.shape or (0,))) * int(dataset.dtype.itemsize)


def backed_bytes(dataset: h5py.Dataset) -> int:
    """Return how large a dataset can be, by what is stored of it; not for a virtual one, of which nothing is."""
    plist = dataset.id.get_create_plist()
    filters = tuple(plist.get_filter(i)[0] for i in range(plist.get_nfilters()))
    # No dataset has more stored bytes than its file: the index of its chunks may say so all the same.
    stored = min(dataset.id.get_storage_size(), dataset.file.id.get_filesize())
    return most_bytes(stored, filters)


def why_not_believable(dataset: h5py.Dataset, backed: int | None = None) -> str | None:
    """Return what is wrong with the size that a dataset claims, or `None`.

    Args:
        dataset: Its own file holds its data.
        backed: From `backed_bytes`, where the caller knows better: for a virtual dataset, the sum over its parts.
    """
    chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize if dataset.chunks else 0
    if chunk > CLAIM_BYTES:
        return f"its chunks take {in_units(chunk)} each in memory, and {in_units(CLAIM_BYTES)} is the most"
    claimed = claimed_bytes(dataset)
    if claimed <= CLAIM_BYTES:
        return None
    backed = backed_bytes(dataset) if backed is None else backed
    if claimed <= backed:
        return None
    return f"it claims {in_units(claimed)}, and what the file stores of it can be {in_units(backed)} at most"


def in_units(size_bytes: int) -> str:
    """Return a size as a person says it."""
    power = min(int(np.log2(max(size_bytes, 1))) // 10, 6)
    return f"{size_bytes / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[power]}"
