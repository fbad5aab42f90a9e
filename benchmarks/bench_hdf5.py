"""HDF5Matrix and MatrixSequence beside h5py's own indexing, on samples of 12 KiB in chunks of 64, gzip + shuffle.

    python -m benchmarks.bench_hdf5 [--json]

Two datasets are compressed: one that fits into the smallest chunk cache (96 MiB inflated), one three times larger (384 MiB).
"cold" means that the cache is at its smallest and few chunks of a batch are in it: most cost an inflation, in h5py and in
ours. "from an empty cache" is what a user sees: the first batches are cold, then more and more of the file is there.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import h5py
import numpy as np

from benchmarks.harness import Ratio, compare, report
from hpcutils.data.chunks import CACHE, CACHE_LEAST_BYTES, LIBDEFLATE, cache_limit
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.mixing import WINDOW_BYTES, MixedOrder
from hpcutils.data.room import ranks_here, usable_bytes

FEATURES, CHUNK, BATCH, NARROW = 3072, 64, 64, 8
ROW_BYTES = FEATURES * 4
SMALL, LARGE = 8192, 3 * CACHE_LEAST_BYTES // ROW_BYTES // CHUNK * CHUNK


def make(path: Path) -> None:
    """Write the datasets. 32 different chunks are repeated: deflate is slow to write, and reading does not notice."""
    rng = np.random.default_rng(0)
    samples = (rng.integers(0, 64, (32 * CHUNK, FEATURES)) / 64).astype("f4")
    with h5py.File(path, "w") as file:
        file["narrow"] = np.resize(samples[:, :NARROW], (SMALL, NARROW))
        file["plain"] = np.resize(samples, (SMALL, FEATURES))
        file.create_dataset("chunked", data=file["plain"], chunks=(CHUNK, FEATURES))
        model = file.create_dataset("model", data=samples, chunks=(CHUNK, FEATURES), compression="gzip", shuffle=True)
        stored = [model.id.read_direct_chunk((start, 0))[1] for start in range(0, len(samples), CHUNK)]
        for name, rows in (("small", SMALL), ("large", LARGE)):
            dataset = file.create_dataset(name, (rows, FEATURES), "f4", chunks=(CHUNK, FEATURES), compression="gzip", shuffle=True)
            for start, data in zip(range(0, rows, CHUNK), cycle(stored), strict=False):
                dataset.id.write_direct_chunk((start, 0), data)


def random_batches(rows: int) -> Iterator[np.ndarray]:
    """Yield sorted batches of different rows: the form that h5py takes."""
    rng = np.random.default_rng(1)
    while True:
        yield np.sort(rng.choice(rows, BATCH, replace=False))


def shuffled_epoch(matrix: HDF5Matrix) -> Callable[[], object]:
    """Return a call that gives the next batch of a `MatrixSequence(shuffle=True)`, without loading Keras for it."""

    def batches() -> Iterator[np.ndarray]:
        for epoch in range(1000):
            order = MixedOrder(len(matrix), CHUNK, 0, WINDOW_BYTES // ROW_BYTES, 0, epoch)
            for start in range(0, len(matrix), BATCH):
                yield matrix.read_rows(order.take(start, start + BATCH))

    epoch = batches()
    # 1.5 epochs of warming up would take as long as the measurement: one window is enough to be in a steady state.
    return lambda: [next(epoch) for _ in range(WINDOW_BYTES // ROW_BYTES // BATCH)]


def shuffled(file: h5py.File, roomy: h5py.File, path: Path) -> list[Ratio]:
    """Compare shuffled batches; `roomy` is a copy of the file, opened with a chunk cache of HDF5 as large as ours."""
    rows = []
    CACHE.limit_bytes = CACHE_LEAST_BYTES
    for name, count in (("small", SMALL), ("large", LARGE)):
        matrix, dataset, ours, theirs = HDF5Matrix(path, name), file[name], random_batches(count), random_batches(count)
        cached = roomy[name]  # kept open: HDF5's cache lives as long as the dataset is open
        case = f"random batch of {BATCH}, {'in the cache' if name == 'small' else 'cold'}"
        for _ in range(30):
            matrix.read_rows(next(ours)), cached[next(theirs)]
        rows += compare(
            case,
            lambda matrix=matrix, ours=ours: matrix.read_rows(next(ours)),
            {
                "h5py dset[sorted]": lambda dataset=dataset, theirs=theirs: dataset[next(theirs)],
                "h5py, 128 MiB chunk cache": lambda cached=cached, theirs=theirs: cached[next(theirs)],
            },
            repeats=25,
        )
    rows.append(from_an_empty_cache(file, path))
    matrix, dataset, theirs = HDF5Matrix(path, "large"), file["large"], random_batches(LARGE)
    batches = WINDOW_BYTES // ROW_BYTES // BATCH
    rows += compare(
        f"{batches} batches of {BATCH} of a shuffled epoch, large",
        shuffled_epoch(matrix),
        {"h5py dset[sorted]": lambda: [dataset[next(theirs)] for _ in range(batches)]},
        repeats=3,
    )
    for name in ("plain", "chunked"):
        matrix, dataset, ours, theirs = HDF5Matrix(path, name), file[name], random_batches(SMALL), random_batches(SMALL)
        rows += compare(
            f"random batch of {BATCH}, {name}",
            lambda matrix=matrix, ours=ours: matrix.read_rows(next(ours)),
            {"h5py dset[sorted]": lambda dataset=dataset, theirs=theirs: dataset[next(theirs)]},
            repeats=15,
        )
    return rows


def from_an_empty_cache(file: h5py.File, path: Path) -> Ratio:
    """Compare an epoch's worth of random batches of the large dataset, with the cache that this machine gives."""
    matrix, dataset, ours, theirs = HDF5Matrix(path, "large"), file["large"], random_batches(LARGE), random_batches(LARGE)
    batches = LARGE // BATCH

    def epoch() -> None:
        CACHE.renew()
        for _ in range(batches):
            matrix.read_rows(next(ours))

    # The peer takes the same time for each batch: a few of them, scaled, say as much as all.
    few = batches // 16
    CACHE.limit_bytes = None
    row = compare(
        f"{batches} random batches from an empty cache",
        epoch,
        {"h5py dset[sorted], a 16th of them": lambda: [dataset[next(theirs)] for _ in range(few)]},
        repeats=3,
    )[0]
    scale = batches / few
    scaled = replace(
        row,
        peer="h5py dset[sorted]",
        peer_s=row.peer_s * scale,
        ratio_median=row.ratio_median * scale,
        ratio_min=row.ratio_min * scale,
        ratio_max=row.ratio_max * scale,
    )
    print(scaled.line(), flush=True)
    CACHE.limit_bytes = CACHE_LEAST_BYTES
    return scaled


def slices(file: h5py.File, path: Path) -> list[Ratio]:
    """Compare slices; the starts differ from call to call, so that neither side has the answer at hand."""
    rows = []
    for name in ("large", "narrow", "plain", "chunked"):
        for size in (1, 8, 64, 1024, SMALL):
            matrix, dataset = HDF5Matrix(path, name), file[name]
            starts = cycle(range(0, len(matrix) - size + 1, size))
            # Microseconds are timed by the hundred.
            calls = max(1, 256 // size)
            rows += compare(
                f"{calls} slices of {size}, {'gzip + shuffle' if name == 'large' else name}",
                lambda matrix=matrix, starts=starts, size=size, calls=calls: [
                    matrix[(start := next(starts)) : start + size] for _ in range(calls)
                ],
                {
                    "h5py dset[a:b]": lambda dataset=dataset, starts=starts, size=size, calls=calls: [
                        dataset[(start := next(starts)) : start + size] for _ in range(calls)
                    ]
                },
                repeats=5 if size == SMALL else 25,
            )
    return rows


def main() -> None:
    """Make the files, run the comparisons, print them."""
    print(
        f"inflating with {'zlib' if LIBDEFLATE is None else 'libdeflate'}, large file {LARGE * ROW_BYTES >> 20} MiB inflated, "
        f"cache {CACHE_LEAST_BYTES >> 20} MiB for 'cold', {cache_limit(usable_bytes(), ranks_here()) >> 20} MiB otherwise"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.h5"
        make(path)
        options = {"mode": "r", "locking": False}
        # A copy: HDF5 opens a dataset once a process, and the first to open it decides about its cache.
        copy = shutil.copy(path, Path(folder) / "copy.h5")
        # A prime number of slots, a hundred times the chunks that fit, as HDF5's manual advises (H5Pset_cache).
        with (
            h5py.File(path, **options) as file,
            h5py.File(copy, **options, rdcc_nbytes=CACHE_LEAST_BYTES, rdcc_nslots=17_107) as roomy,
        ):
            report(shuffled(file, roomy, path) + slices(file, path))


if __name__ == "__main__":
    main()
