"""A file four times as large as the memory that a process may still take trains, predicts, and is read in parts."""

import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest

ROWS, FEATURES = 96 * 1024, 4096  # 1.5 GiB of float32
LIMIT_BYTES = ROWS * FEATURES * 4 // 4

PRELUDE = f"""
    import resource, sys, warnings
    import numpy as np
    from hpcutils.data.hdf5 import CopyWarning, HDF5Matrix
    path = sys.argv[1]
    warnings.filterwarnings("error", category=CopyWarning)

    def limit():
        '''From here on the process may take LIMIT_BYTES more memory than it has now; what asks for more dies.'''
        status = open("/proc/self/status").read()
        data = int(status.split("VmData:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (data + {LIMIT_BYTES},) * 2)

    def resident():
        status = open("/proc/self/status").read()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
"""

KERAS = """
    import keras
    model = keras.Sequential([keras.layers.Input((4096,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(np.zeros((256, 4096), "f4"), np.zeros(256), batch_size=128, verbose=0)
    model.predict(np.zeros((256, 4096), "f4"), batch_size=128, verbose=0)
    x, y = HDF5Matrix(path, "x"), HDF5Matrix(path, "y")
    limit()
    before = resident()
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file whose `x` inflates to 1.5 GiB; on disk it is small, so that the test does not measure the disk."""
    path = tmp_path_factory.mktemp("memory") / "large.h5"
    with h5py.File(path, "w") as file:
        x = file.create_dataset("x", (ROWS, FEATURES), "f4", chunks=(64, FEATURES), compression="gzip", shuffle=True)
        block = np.zeros((64, FEATURES), "f4")
        block[:, 0] = np.arange(64) / 64
        x[:64] = block
        mask, stored = x.id.read_direct_chunk((0, 0))
        for start in range(0, ROWS, 64):
            x.id.write_direct_chunk((start, 0), stored, mask)
        file["y"] = np.arange(ROWS, dtype="f4") % 64 / 64
    yield path
    path.unlink()


def run(code, path):
    program = textwrap.dedent(PRELUDE) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False, timeout=500)


def test_training_on_matrices_as_they_are(large):
    ended = run(
        KERAS
        + """
    history = model.fit(x, y, batch_size=128, verbose=0)
    assert np.isfinite(history.history["loss"][0])
    answers = model.predict(x, batch_size=128, verbose=0)
    assert len(answers) == len(x)
    assert "hpcutils.data.sequence" in sys.modules, "Keras was told when it first saw a matrix"
    print(resident() - before)
    """,
        large,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert int(ended.stdout) < LIMIT_BYTES


@pytest.mark.parametrize("workers", [1, 2])
def test_training_on_shuffled_batches_is_flat(large, workers):
    """The second epoch takes no more memory than the first."""
    ended = run(
        KERAS
        + f"""
    from hpcutils.data.sequence import MatrixSequence
    batches = MatrixSequence(x, y, 128, shuffle=True)
    batches.workers = {workers}
    model.fit(batches, verbose=0)
    first = resident()
    model.fit(batches, verbose=0)
    print(first - before, resident() - first)
    """,
        large,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    taken, grown = map(int, ended.stdout.split())
    assert taken < LIMIT_BYTES
    assert grown < 64 << 20


def test_parts_of_rows_are_read_in_pieces(large):
    ended = run(
        """
    x = HDF5Matrix(path, "x")
    limit()
    assert np.array_equal(x[:, 0], np.arange(len(x)) % 64 / 64)
    assert x[::-1000, 1:3].sum() == 0
    """,
        large,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_the_limit_is_real(large):
    """The same file does not fit: what the tests above hold would fail without reading in parts."""
    ended = run("x = HDF5Matrix(path, 'x'); limit(); x[:]", large)
    assert ended.returncode != 0
    assert "MemoryError" in ended.stderr
