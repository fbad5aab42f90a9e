"""Shuffled reading on two ranks of one node beside its peers: samples of 12 KiB, global batch 256.

    python -m benchmarks.bench_data_path [--gib STORED] [--json]

Writes float32 samples with gzip + shuffle until the file has STORED GiB (4) on the disk, half of that plain, and
mosaicml-streaming's own format; makes a throw-away environment with PyTorch (CPU) and mosaicml-streaming. Ours and the peers
alternate; medians of three.
With 4 GiB it takes some 15 minutes on two idle cores: 2 to write, 2 for the peers' environment, 3 a round, 2 for the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.data_path_files import ROW_BYTES, check_disk, write_compressed, write_plain
from hpcutils.launch.local import LOCAL_ENVIRONMENT, find_mpirun

ROOT = Path(__file__).resolve().parents[1]
BATCH, RANKS = 256, 2
ROUNDS, SECONDS = 3, 5
# Samples that the steps go over, twice: many times what windows hold at once.
STEP_SAMPLES = 200_000
OURS, INFLATE, DECODE = "windows, 2 ranks", "inflate alone, 2 cores", "fetch, inflate, unshuffle alone, 2 cores"
SEQUENTIAL, SLICES = "h5py sequential, 1 core", "old HDF5Matrix: batches change places"
STREAMING = "mosaicml-streaming, own format, 2 workers"
STUB = {
    "__init__.py": "",
    "datasets.py": "class VisionDataset: ...\n",
    "transforms/__init__.py": "",
    "transforms/functional.py": "to_tensor = None\n",
}
PEER_PACKAGES = ("torch==2.13.0+cpu", "mosaicml-streaming", "h5py", "numpy")


def ours(what: str, path: Path, epochs: int = 1, more: str = "") -> dict:
    words = [find_mpirun(), "-n", str(RANKS), *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    words += [sys.executable, "-m", "benchmarks.data_path_rank", what, str(path), "x", str(BATCH), str(epochs)]
    done = subprocess.run(
        [*words, *([more] if more else [])],
        cwd=ROOT,
        env=os.environ | LOCAL_ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr[-2000:]}")
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
    subprocess.run([python, "-m", "pip", "install", "-qq", *PEER_PACKAGES], check=True)
    # mosaicml-streaming imports torchvision for its picture data sets, and the one that comes along wants PyTorch with CUDA.
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "torchvision"], check=True)
    stub = next((folder / "peers" / "lib").glob("python*")) / "site-packages" / "torchvision"
    (stub / "transforms").mkdir(parents=True)
    for name, text in STUB.items():
        (stub / name).write_text(text)
    return python


def compare(path: Path, python: str) -> tuple[dict[str, float], float]:
    """Return medians of samples/s by name, from rounds of all, one after the other; and the most that a chunk was fetched for."""
    chunks: list[float] = []

    def windows() -> float:
        said = ours("windows", path)
        chunks.extend(said["chunks"])
        return said["samples_per_s"][0]

    calls = {
        OURS: windows,
        INFLATE: lambda: ours("inflate", path)["samples_per_s"][0],
        DECODE: lambda: ours("decode", path)["samples_per_s"][0],
        SEQUENTIAL: lambda: peer(sys.executable, "sequential", path),
        SLICES: lambda: peer(sys.executable, "slices", path),
        "h5py, sorted random batches": lambda: peer(sys.executable, "fancy", path),
        "PyTorch DataLoader + h5py, 2 workers": lambda: peer(python, "torch_loader", path),
        "tf.data from a generator": lambda: peer(sys.executable, "tf_generator", path),
        "Keras PyDataset, 2 workers": lambda: peer(sys.executable, "py_dataset", path),
        STREAMING: lambda: peer(python, "streaming", path),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            found[name].append(call())
    for name, values in found.items():
        print(f"{name:<48} {statistics.median(values):10.0f} samples/s   [{min(values):.0f}, {max(values):.0f}]", flush=True)
    return {name: statistics.median(values) for name, values in found.items()}, max(chunks)


def judge(found: dict[str, float]) -> dict[str, float]:
    """Print the ratios that the issue asks for, each with what was aimed at."""
    own = found[OURS]
    peers = [name for name in found if name not in (OURS, INFLATE, DECODE, SEQUENTIAL, STREAMING)]
    best = max(peers, key=found.__getitem__)
    mixing = max((name for name in peers if name != SLICES), key=found.__getitem__)
    ratios = {}
    for name, text, value, target in (
        ("best_hdf5_peer", f"x the best HDF5 peer ({best})", own / found[best], "10"),
        ("best_mixing_hdf5_peer", f"x the best of those that mix samples ({mixing})", own / found[mixing], "10"),
        ("streaming", "x mosaicml-streaming on its own format", own / found[STREAMING], "3"),
        ("sequential", "x h5py sequential on one core", own / found[SEQUENTIAL], "4"),
        ("inflate", "of inflating the chunks alone", own / found[INFLATE], "0.8"),
        ("decode", "of fetching, inflating and unshuffling alone", own / found[DECODE], "none"),
    ):
        ratios[name] = value
        print(f"{value:8.2f} {text} (target {target})")
    return ratios


def steps(path: Path, found: dict[str, float]) -> dict:
    """Train a model whose step takes longer than its data, by the steps and windows of a job, and print what it waited."""
    said = ours("steps", path, 2, str(STEP_SAMPLES))
    shares = ", ".join(f"{100 * share:.2f} %" for share in said["waited"])
    print(
        f"steps of {1e3 * said['step_s']:.1f} ms, their data {1e3 * BATCH / found[OURS]:.1f} ms: waited {shares} of each epoch "
        f"(target 2 %), chunks fetched {said['chunks']} times"
    )
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gib", type=float, default=4, metavar="STORED", help="size of the compressed file on the disk (default 4)"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON, too, on the last line")
    options = parser.parse_args()
    stored = int(options.gib * 2**30)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check_disk(folder, stored)
        path, plain = folder / "data.h5", folder / "plain.h5"
        started = time.perf_counter()
        samples = write_compressed(path, stored)
        write_plain(plain, stored // 2)
        print(
            f"{samples} samples of {ROW_BYTES} bytes: {path.stat().st_size / 2**30:.2f} GiB on the disk, "
            f"{samples * ROW_BYTES / 2**30:.2f} GiB inflated; written in {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        python = environment(folder)
        peer(python, "write_streaming", path)
        found, chunks = compare(path, python)
        ratios = judge(found)
        print(f"{chunks:8.2f} times was each chunk fetched and inflated an epoch, at most (target 1.00)")
        read, copied = (ours(what, plain, 2)["samples_per_s"][-1] for what in ("windows", "copy"))
        print(f"{read / copied:8.2f} of memory-copy speed, not compressed: {read:.0f} samples/s, copied {copied:.0f} (target 0.6)")
        waits = steps(path, found)
        if options.json:
            print(json.dumps(found | {"ratios": ratios, "chunks": chunks, "plain": read, "copy": copied, "steps": waits}))


if __name__ == "__main__":
    main()
