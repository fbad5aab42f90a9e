"""Shuffled reading on two ranks of one node beside its peers: samples of 12 KiB, global batch 256.

    python -m benchmarks.bench_data_path [GIB] [--json]

Writes GIB (4) of float32 samples with gzip + shuffle, a quarter of that plain, and mosaicml-streaming's own format; makes a
throw-away environment with PyTorch (CPU) and mosaicml-streaming. Ours and the peers alternate; medians of three.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import cycle
from pathlib import Path

import h5py
import numpy as np

from hpcutils.launch.local import LOCAL_ENVIRONMENT, find_mpirun

ROOT = Path(__file__).resolve().parents[1]
FEATURES, CHUNK, BATCH, RANKS = 3072, 64, 256, 2
ROUNDS, SECONDS = 3, 5
STUB = {
    "__init__.py": "",
    "datasets.py": "class VisionDataset: ...\n",
    "transforms/__init__.py": "",
    "transforms/functional.py": "to_tensor = None\n",
}
PEER_PACKAGES = ("torch==2.13.0+cpu", "mosaicml-streaming", "h5py", "numpy")


def write(path: Path, samples: int) -> None:
    """Write the datasets: 32 different chunks, repeated; deflate is slow to write, and reading does not notice."""
    rng = np.random.default_rng(0)
    rows = (rng.integers(0, 64, (32 * CHUNK, FEATURES)) / 64).astype("f4")
    with h5py.File(path, "w") as file:
        model = file.create_dataset("model", data=rows, chunks=(CHUNK, FEATURES), compression="gzip", shuffle=True)
        stored = [model.id.read_direct_chunk((start, 0))[1] for start in range(0, len(rows), CHUNK)]
        x = file.create_dataset("x", (samples, FEATURES), "f4", chunks=(CHUNK, FEATURES), compression="gzip", shuffle=True)
        for start, data in zip(range(0, samples, CHUNK), cycle(stored), strict=False):
            x.id.write_direct_chunk((start, 0), data)
    with h5py.File(path.with_name("plain.h5"), "w") as file:
        plain = file.create_dataset("x", (samples // 4, FEATURES), "f4")
        for start in range(0, samples // 4, len(rows)):
            plain[start : start + len(rows)] = rows[: samples // 4 - start]


def ours(what: str, path: Path, epochs: int = 1, step_ms: float = 0) -> dict:
    words = [find_mpirun(), "-n", str(RANKS), *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    words += [sys.executable, "-m", "benchmarks.data_path_rank", what, str(path), "x", str(BATCH), str(epochs)]
    done = subprocess.run(
        [*words, *([str(step_ms)] if step_ms else [])],
        cwd=ROOT,
        env=os.environ | LOCAL_ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def peer(python: str, what: str, path: Path) -> float:
    words = [python, str(ROOT / "benchmarks" / "data_path_peer.py"), what, str(path), "x", str(BATCH), str(SECONDS)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["samples_per_s"]) if done.stdout else 0.0


def environment(folder: Path) -> str:
    """Make an environment with the peers and return its Python; `$HPCUTILS_BENCH_PEERS` names one that is there already."""
    known = os.environ.get("HPCUTILS_BENCH_PEERS")
    if known:
        return known
    subprocess.run([sys.executable, "-m", "venv", str(folder / "peers")], check=True)
    python = str(folder / "peers" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", *PEER_PACKAGES], check=True)
    # mosaicml-streaming imports torchvision for its picture data sets, and the one that comes along wants PyTorch with CUDA.
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "torchvision"], check=True)
    stub = next((folder / "peers" / "lib").glob("python*")) / "site-packages" / "torchvision"
    (stub / "transforms").mkdir(parents=True)
    for name, text in STUB.items():
        (stub / name).write_text(text)
    return python


def compare(path: Path, python: str) -> dict[str, float]:
    """Return medians of samples/s by name; rounds of all, one after the other."""
    calls = {
        "windows, 2 ranks": lambda: ours("windows", path)["samples_per_s"][0],
        "inflate alone, 2 cores": lambda: ours("inflate", path)["samples_per_s"][0],
        "fetch, inflate, unshuffle alone, 2 cores": lambda: ours("decode", path)["samples_per_s"][0],
        "h5py sequential, 1 core": lambda: peer(sys.executable, "sequential", path),
        "h5py, batches change places (old HDF5Matrix)": lambda: peer(sys.executable, "slices", path),
        "h5py, sorted random batches": lambda: peer(sys.executable, "fancy", path),
        "PyTorch DataLoader + h5py, 2 workers": lambda: peer(python, "torch_loader", path),
        "mosaicml-streaming, own format, 2 workers": lambda: peer(python, "streaming", path),
        "tf.data from a generator": lambda: peer(sys.executable, "tf_generator", path),
        "Keras PyDataset, 2 workers": lambda: peer(sys.executable, "py_dataset", path),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            found[name].append(call())
    for name, values in found.items():
        print(f"{name:<48} {statistics.median(values):10.0f} samples/s   [{min(values):.0f}, {max(values):.0f}]", flush=True)
    return {name: statistics.median(values) for name, values in found.items()}


def judge(found: dict[str, float]) -> None:
    """Print the ratios that matter, each with what was aimed at."""
    own = found["windows, 2 ranks"]
    shuffled = [name for name in found if name.startswith(("h5py, sorted", "PyTorch", "tf.data", "Keras"))]
    best = max(shuffled, key=found.__getitem__)
    for text, value, target in (
        (f"x the best HDF5 peer that shuffles ({best})", own / found[best], 10),
        ("x mosaicml-streaming", own / found["mosaicml-streaming, own format, 2 workers"], 3),
        ("x h5py sequential on one core", own / found["h5py sequential, 1 core"], 4),
        ("of inflating alone", own / found["inflate alone, 2 cores"], 0.8),
        ("of fetching, inflating and unshuffling alone", own / found["fetch, inflate, unshuffle alone, 2 cores"], 0.8),
    ):
        print(f"{value:8.2f} {text} (target {target})")


def main() -> None:
    numbers = [float(word) for word in sys.argv[1:] if not word.startswith("-")]
    samples = int((numbers or [4])[0] * 2**30) // (FEATURES * 4) // CHUNK * CHUNK
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "data.h5"
        write(path, samples)
        python = environment(folder)
        peer(python, "write_streaming", path)
        found = compare(path, python)
        judge(found)
        waits = ours("windows", path, 2, step_ms=1.5e3 * BATCH / found["windows, 2 ranks"])
        shares = ", ".join(f"{100 * share:.2f} %" for share in waits["waited"])
        print(f"steps half as long again as their data: chunks fetched {waits['chunks']} times, waited {shares}")
        plain, copied = (ours(what, folder / "plain.h5", 2)["samples_per_s"][-1] for what in ("windows", "copy"))
        print(f"not compressed: {plain:.0f} samples/s, copying alone {copied:.0f}: {plain / copied:.2f} (target 0.6)")
        if "--json" in sys.argv:
            print(json.dumps(found | {"waited": waits["waited"], "chunks": waits["chunks"], "plain": plain, "copy": copied}))


if __name__ == "__main__":
    main()
