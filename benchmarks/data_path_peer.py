"""One peer of `bench_data_path`, in an environment that has it; prints samples/s as JSON. Run by file name, not as a module.

    python data_path_peer.py WHAT FILE DATASET BATCH SECONDS

Each peer shuffles its own way, and reads for about SECONDS.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator

import numpy as np

WORKERS = 2


def rate(batches: Iterable[object], batch: int, seconds: float) -> float:
    """Return samples a second after the first batch, over `seconds` or until there are no more."""
    stream = iter(batches)
    next(stream)
    started, count = time.perf_counter(), 0
    for _ in stream:
        count += 1
        if time.perf_counter() - started > seconds:
            break
    return count * batch / (time.perf_counter() - started)


def sequential(path: str, name: str, batch: int) -> Iterator[object]:
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        dataset = file[name]
        for start in range(0, len(dataset) - batch, batch):
            yield dataset[start : start + batch]


def slices(path: str, name: str, batch: int) -> Iterator[object]:
    """The old `HDF5Matrix` under `shuffle="batch"`: whole batches change places."""
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        dataset = file[name]
        for number in np.random.default_rng(0).permutation(len(dataset) // batch):
            yield dataset[number * batch : (number + 1) * batch]


def fancy(path: str, name: str, batch: int) -> Iterator[object]:
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        dataset, rng = file[name], np.random.default_rng(0)
        while True:
            yield dataset[np.sort(rng.choice(len(dataset), batch, replace=False))]


def torch_loader(path: str, name: str, batch: int) -> Iterable[object]:
    import h5py
    import torch

    class Rows(torch.utils.data.Dataset):
        file = None

        def __len__(self) -> int:
            with h5py.File(path, "r", locking=False) as file:
                return len(file[name])

        def __getitem__(self, index: int) -> np.ndarray:
            if self.file is None:
                self.file = h5py.File(path, "r", locking=False)
                self.rows = self.file[name]
            return self.rows[index]

    return torch.utils.data.DataLoader(Rows(), batch, shuffle=True, num_workers=WORKERS)


def streaming(path: str, name: str, batch: int) -> Iterable[object]:
    """mosaicml-streaming on its own format, not compressed, written to `path` + `.mds` beforehand."""
    import torch
    from streaming import StreamingDataset

    return torch.utils.data.DataLoader(
        StreamingDataset(local=f"{path}.mds", shuffle=True, batch_size=batch), batch, num_workers=WORKERS
    )


def write_streaming(path: str, name: str, batch: int) -> None:
    import h5py
    from streaming import MDSWriter

    with (
        h5py.File(path, "r", locking=False) as file,
        MDSWriter(out=f"{path}.mds", columns={"x": f"ndarray:float32:{file[name].shape[1]}"}) as out,
    ):
        for start in range(0, min(len(file[name]), 400 * batch), 4 * batch):
            for row in file[name][start : start + 4 * batch]:
                out.write({"x": row})


def tf_generator(path: str, name: str, batch: int) -> Iterable[object]:
    import h5py
    import tensorflow as tf

    with h5py.File(path, "r", locking=False) as file:
        rows, width = len(file[name]), file[name].shape[1]

    def samples() -> Iterator[np.ndarray]:
        with h5py.File(path, "r", locking=False) as file:
            dataset = file[name]
            for index in np.random.default_rng(0).permutation(rows):
                yield dataset[index]

    return tf.data.Dataset.from_generator(samples, output_signature=tf.TensorSpec((width,), tf.float32)).batch(batch).prefetch(2)


def py_dataset(path: str, name: str, batch: int) -> Iterable[object]:
    import h5py
    import keras
    from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter

    class Batches(keras.utils.PyDataset):
        def __init__(self) -> None:
            super().__init__(workers=WORKERS)
            self.file = h5py.File(path, "r", locking=False)
            self.order = np.random.default_rng(0).permutation(len(self.file[name]))

        def __len__(self) -> int:
            return len(self.order) // batch

        def __getitem__(self, index: int) -> tuple[np.ndarray]:
            return (self.file[name][np.sort(self.order[index * batch : (index + 1) * batch])],)

    return PyDatasetAdapter(Batches()).get_tf_dataset()


PEERS = {call.__name__: call for call in (sequential, slices, fancy, torch_loader, streaming, tf_generator, py_dataset)}


def main() -> None:
    what, path, name, batch, seconds = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TMPDIR", tempfile.gettempdir())
    if what == "write_streaming":
        write_streaming(path, name, batch)
        return
    print(json.dumps({"samples_per_s": rate(PEERS[what](path, name, batch), batch, seconds)}), flush=True)
    os._exit(0)  # worker processes and threads of the peers are not ours to wait for


if __name__ == "__main__":
    main()
