"""The mean gradient of a batch is the true one, also of the last, padded batch: 2 and 3 ranks end where one rank and Keras do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcutils.launch.local import LOCAL_ENVIRONMENT, find_mpirun

PROGRAM = Path(__file__).with_name("mean_ranks.py")
# (samples, batch): tails of 1, of fewer samples than ranks, odd ones, a batch that is larger than the data, and no tail.
CASES = ("33,16", "34,16", "37,8", "61,20", "5,64", "2,7", "48,16")
STEPS, WORDS, SAMPLES = 6, 11, 64

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Samples of very different size, and sequences of very different length: a wrong weight shows."""
    path = tmp_path_factory.mktemp("mean") / "data.h5"
    random = np.random.default_rng(5)
    words = random.integers(1, WORDS, (SAMPLES, STEPS))
    words[np.arange(STEPS) >= random.integers(1, STEPS + 1, SAMPLES)[:, None]] = 0
    with h5py.File(path, "w") as file:
        dense = random.normal(size=(SAMPLES, STEPS)) * np.geomspace(0.1, 2, SAMPLES)[:, None]
        file.create_dataset("dense", data=dense.astype("f4"), chunks=(4, STEPS))
        file["dense_y"] = random.normal(size=(SAMPLES, 1)).astype("f4")
        file.create_dataset("masked", data=words.astype("i4"), chunks=(4, STEPS))
        file["masked_y"] = random.integers(0, 3, (SAMPLES, STEPS)).astype("i4")
    return path


def results(path: Path, kind: str, ranks: int) -> dict[str, np.ndarray]:
    mpirun = [find_mpirun(), "-n", str(ranks), *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    done = subprocess.run(
        [*(mpirun if ranks > 1 else []), sys.executable, str(PROGRAM), str(path), kind, *CASES],
        env=os.environ | LOCAL_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: np.array(found) for name, found in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("kind", ["dense", "masked"])
def test_one_step_on_the_last_batch_is_the_same_for_any_world(path, kind):
    alone = results(path, kind, 1)
    np.testing.assert_allclose(alone["ours"], alone["keras"], rtol=0, atol=1e-6)
    assert alone["metrics"].shape == (len(CASES), 2)
    for ranks in (2, 3):
        found = results(path, kind, ranks)
        np.testing.assert_allclose(found["ours"], alone["ours"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(found["metrics"], alone["metrics"], rtol=1e-5, atol=1e-6)
