"""The files of `bench_data_path`: as large as asked for *as stored*, written by all cores."""

from __future__ import annotations

import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np

FEATURES, CHUNK = 3072, 64
ROW_BYTES = FEATURES * 4
# Chunks that are made at once, while the last ones are written.
AHEAD = 256
# Of each byte of the compressed file: that file, half of it plain; and what does not grow with it: mosaicml-streaming's own
# copy (400 batches), and an environment with PyTorch.
DISK_SHARE, DISK_MORE = 1.55, 4 << 30


def check_disk(folder: Path, stored_bytes: int) -> None:
    """End the benchmark where the disk is too small for it."""
    needed, free = int(stored_bytes * DISK_SHARE) + DISK_MORE, shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{folder} has {free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} are needed; set TMPDIR to a larger disk, or "
            "give a smaller --gib (the issue asks for 4)"
        )


def make_chunk(number: int) -> np.ndarray:
    """Return the rows of a chunk, each chunk different: floats of 64 levels, as normalised pixels are."""
    values = np.random.default_rng(number).integers(0, 64, (CHUNK, FEATURES), np.uint8)
    return values.astype("f4") / 64


def compressed(number: int) -> bytes:
    """Return a chunk as HDF5 stores it behind shuffle and gzip of level 4, which is what h5py takes."""
    planes = np.ascontiguousarray(make_chunk(number).reshape(-1, 1).view("u1").T)
    return zlib.compress(planes, 4)


def write_compressed(path: Path, stored_bytes: int) -> int:
    """Write x, `(samples, FEATURES)` float32, chunks of CHUNK samples, until the chunks take so many bytes; and labels y."""
    with h5py.File(path, "w") as file, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        options = {"chunks": (CHUNK, FEATURES), "maxshape": (None, FEATURES), "compression": "gzip", "shuffle": True}
        x = file.create_dataset("x", (0, FEATURES), "f4", **options)
        stored, number = 0, 0
        coming = pool.map(compressed, range(AHEAD))
        while stored < stored_bytes:
            ready, coming = coming, pool.map(compressed, range(number + AHEAD, number + 2 * AHEAD))
            x.resize((number + AHEAD) * CHUNK, 0)
            for data in ready:
                x.id.write_direct_chunk((number * CHUNK, 0), data)
                stored, number = stored + len(data), number + 1
        pool.shutdown(cancel_futures=True)
        file["y"] = np.arange(len(x)) % 10
        return len(x)


def write_plain(path: Path, size_bytes: int) -> None:
    """Write x without chunks and filters."""
    count = max(size_bytes // (CHUNK * ROW_BYTES), 1)
    with h5py.File(path, "w") as file, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        x = file.create_dataset("x", (count * CHUNK, FEATURES), "f4")
        for first in range(0, count, AHEAD):
            numbers = range(first, min(first + AHEAD, count))
            for number, rows in zip(numbers, pool.map(make_chunk, numbers), strict=True):
                x[number * CHUNK : (number + 1) * CHUNK] = rows
