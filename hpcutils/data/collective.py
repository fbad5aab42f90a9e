"""Windows read by MPI-IO, all ranks of a node together: for file systems that serve one large request better than many.

`with dataset.collective:` of h5py reads plain numbers through a short cut that does not look at it (since h5py 3.0): here the
low-level read is called with the transfer property itself. Every rank takes part in every read, also with nothing to read: a
rank that stayed away would leave the others waiting for ever. Reads lie between the steps, in
the thread that runs them (`needs_main_thread`); HDF5's own calls wait inside of MPI, ours asleep.
"""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpcutils.data.codecs import need_filters
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.order import Order
from hpcutils.data.schedule import Task
from hpcutils.data.segments import count_chunks, part_of
from hpcutils.data.shards import Window
from hpcutils.data.windows import WindowReader
from hpcutils.errors import DataError, MissingPartError


def check_parallel_hdf5() -> None:
    """Raise `MissingPartError` unless h5py was built with MPI."""
    if not h5py.get_config().mpi:
        raise MissingPartError(
            "'read: mpio' needs an h5py that was built with MPI, and this one was not",
            "use an image that has it (tf-horovod-cpu), or 'read: window'",
        )


class CollectiveReader(WindowReader):
    """A `WindowReader` whose windows are read by collective MPI-IO.

    Args:
        matrices: As for `WindowReader`, each of one file.
        order: This rank's.
        node: mpi4py communicator of the ranks of this node; all of them read together.
        epochs: Number of all epochs.
    """

    def __init__(self, matrices: list[HDF5Matrix], order: Order, node: Any, epochs: int | None = None) -> None:
        check_parallel_hdf5()
        super().__init__(matrices, order, node, epochs, in_background=False)
        # All ranks do every task.
        self._turns = range(self._all_turns)
        self._transfer = h5py.h5p.create(h5py.h5p.DATASET_XFER)
        self._transfer.set_dxpl_mpio(h5py.h5fd.MPIO_COLLECTIVE)
        self._files = matrices
        self._datasets = [_open_together(matrix, node) for matrix in matrices]

    def close(self) -> None:
        """Let go of memory and files; all ranks of the node call it."""
        self._barrier()
        files = [dataset.file for dataset in self._datasets]
        # Before the files: with MPI, HDF5 closes no file that something of it is open in.
        self._datasets.clear()
        for file in files:
            file.close()
        super().close()

    def _fill(self, task: Task, window: Window, borders: list[int]) -> None:
        # Chunks by turns; in the file's order, which is the order in which a selection of several pieces is read.
        own = sorted(range(self._rank, len(window.starts), self._ranks), key=lambda number: int(window.starts[number]))
        pieces = [(int(window.starts[number]), borders[number], borders[number + 1]) for number in own]
        for number, (matrix, dataset, rows) in enumerate(zip(self._files, self._datasets, self._rows, strict=True)):
            self._read_together(matrix, dataset, rows, pieces)
            parts = (part_of(matrix.segments, first, first + high - low) for first, low, high in pieces)
            self._counted[task.epoch, number] += sum(map(count_chunks, parts))
        self._barrier()

    def _read_together(
        self, matrix: HDF5Matrix, dataset: h5py.Dataset, rows: NDArray[Any], pieces: list[tuple[int, int, int]]
    ) -> None:
        """Read `(first row, low, high)` pieces into `rows[low:high]`, in one request with all other ranks."""
        count = sum(high - low for _, low, high in pieces)
        there = dataset.id.get_space()
        there.select_none()
        for first, low, high in pieces:
            start = (first + matrix.start, *[0] * (dataset.ndim - 1))
            there.select_hyperslab(start, (high - low, *dataset.shape[1:]), op=h5py.h5s.SELECT_OR)
        read = np.empty((count, *dataset.shape[1:]), dataset.dtype)
        here = h5py.h5s.create_simple(read.shape if count else (1, *dataset.shape[1:]))
        if not count:
            here.select_none()
        try:
            dataset.id.read(here, there, read if count else np.empty((1, *dataset.shape[1:]), dataset.dtype), dxpl=self._transfer)
        except (OSError, RuntimeError) as exc:
            raise DataError(f"{matrix!r}: cannot be read together: {exc}", "the file is damaged, or a filter is missing") from exc
        done = 0
        for _, low, high in pieces:
            rows[low:high] = read[done : done + high - low]
            done += high - low


def _open_together(matrix: HDF5Matrix, node: Any) -> h5py.Dataset:
    """Open a matrix' dataset on all ranks; `HDF5Matrix` has looked at it, so that it leads to no other file."""
    try:
        dataset = h5py.File(matrix.datapath, "r", driver="mpio", comm=node)[matrix.dataset]
    except OSError as exc:
        raise DataError(f"{matrix.datapath}: cannot be opened by MPI-IO: {exc}") from exc
    need_filters(dataset)
    return dataset
