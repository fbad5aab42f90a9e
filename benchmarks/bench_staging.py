"""Staging beside what people do by hand: `cp` and `sha256sum`, pooch, Keras' get_file; on one node and on many.

    python -m benchmarks.bench_staging [--parts file,small,nodes] [--size-mib 4096] [--files 100000] [--folder DIR]
        [--nodes 2,4,8,16] [--json]

The defaults are what is claimed: one file of 4 GiB, 100,000 small files, 2 to 16 nodes; each ratio with its spread
over `--repeats` runs. Ours flushes every file to the disk before the dataset gets its name; the peers leave it in memory, so they
are run with `sync` too. Nothing is removed on the clock. All of it takes an hour.

With `--nodes` (and root) the same runs on a sandbox cluster. How often the source is read is the kernel's count of each node's
processes (/proc/self/io, rchar), for ours and for `cp`, over the dataset's bytes. MPI between the nodes of one machine goes through
sockets, whose reads count there too: what hpcutils received from neighbours is subtracted. The limit there is the machine: all
nodes share its cores, memory and disk, so that N nodes write and hash N copies with the cores of one. `cores` in each row says how
many; a time over one node's of N / cores is what the processors alone would take. The network is not the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.bench_get_file import serving
from benchmarks.harness import Ratio, compare, report
from hpcutils.staging.find import find_files
from hpcutils.staging.items import Item, Settings
from hpcutils.staging.leaders import Leaders
from hpcutils.staging.manifest import write_manifest
from hpcutils.staging.stage import stage_item, stage_manifest


class Fresh:
    """A call that is given a new folder each time, which is removed when the clock has stopped.

    Args:
        folder: Where the folders are.
        call: What to measure.
        keep: Leave them until the end. ext4 looks at every inode that was freed a moment ago before it gives out another: making
            100,000 files just after as many were removed takes it a minute and not two seconds, whoever makes them.
    """

    numbers = itertools.count()

    def __init__(self, folder: Path, call: Callable[[Path], object], keep: bool = False) -> None:
        self._folder, self._call, self._keep = folder, call, keep
        self._last = folder

    def __call__(self) -> None:
        self._last = self._folder / f"run-{next(self.numbers)}"
        self._last.mkdir(parents=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self._call(self._last)

    def tidy(self) -> None:
        """Remove what the last call made; what others have in memory goes to the disk before the next one begins."""
        if not self._keep:
            shutil.rmtree(self._last)
        os.sync()


def shell(command: str) -> Callable[[Path], object]:
    return lambda place: subprocess.run(["bash", "-c", command, "bash", str(place)], check=True, stdout=subprocess.DEVNULL)


def write_random(path: Path, size_bytes: int) -> None:
    with path.open("wb") as stream:
        for start in range(0, size_bytes, 64 << 20):
            stream.write(os.urandom(min(64 << 20, size_bytes - start)))


def one_file(folder: Path, size_bytes: int, repeats: int) -> list[Ratio]:
    """A large file from a folder, with a manifest and with a sha256 alone."""
    source = folder / "source"
    source.mkdir()
    write_random(source / "x", size_bytes)
    manifest = write_manifest(find_files([source]), folder / "m.jsonl").path
    with (source / "x").open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    by_hand = f'cp {source}/x "$1/x" && sha256sum "$1/x"'
    peers = {"cp; sha256sum": shell(by_hand), "cp; sync; sha256sum": shell(by_hand.replace("&&", '&& sync "$1/x" &&'))}
    peers = {name: Fresh(folder / "runs", call) for name, call in peers.items()}
    size = f"{size_bytes >> 20} MiB"
    item = Item("x", str(source / "x"), sha256)
    rows = compare(
        f"stage, one file, {size}, manifest",
        Fresh(folder / "runs", lambda place: stage_manifest(manifest, str(source), Settings(place / "cache"), Leaders())),
        peers,
        repeats,
    )
    rows += compare(
        f"stage, one file, {size}, sha256",
        Fresh(folder / "runs", lambda place: stage_item(item, Settings(place / "cache"), Leaders())),
        peers,
        repeats,
    )
    return rows + over_http(folder, source, sha256, size, repeats)


def over_http(folder: Path, source: Path, sha256: str, size: str, repeats: int) -> list[Ratio]:
    """The same file from a server on this machine."""
    import keras
    import pooch

    pooch.get_logger().setLevel("ERROR")
    os.environ["no_proxy"] = "127.0.0.1"
    with serving(source) as url:
        peers = {
            "pooch.retrieve": lambda place: pooch.retrieve(f"{url}/x", f"sha256:{sha256}", "x", place),
            "keras.utils.get_file": lambda place: keras.utils.get_file("x", f"{url}/x", file_hash=sha256, cache_dir=place),
        }
        ours = Fresh(folder / "runs", lambda place: stage_item(Item("x", f"{url}/x", sha256), Settings(place / "cache"), Leaders()))
        runs = {name: Fresh(folder / "runs", call) for name, call in peers.items()}
        return compare(f"stage, one file, {size}, http", ours, runs, repeats)


def small_files(folder: Path, count: int, repeats: int) -> list[Ratio]:
    """Many small files, and the start that finds them all there."""
    source = folder / "small"
    for number in range(count):
        if number % 1000 == 0:
            (source / f"{number // 1000:04}").mkdir(parents=True)
        (source / f"{number // 1000:04}" / f"{number:07}.jpg").write_bytes(os.urandom(1000 + number % 9000))
    manifest = write_manifest(find_files([source]), folder / "small.jsonl").path
    copy = f'cp -r {source} "$1/x" && find "$1/x" -type f -print0 | '
    peers = {
        "cp -r; sha256sum by xargs": shell(copy + "xargs -0 sha256sum"),
        "cp -r; sha256sum a file": shell(copy + "xargs -0 -n1 sha256sum"),
    }
    runs = folder / "runs"
    ours = Fresh(runs, lambda place: stage_manifest(manifest, str(source), Settings(place / "cache"), Leaders()), keep=True)
    rows = compare(
        f"stage, {count} small files", ours, {name: Fresh(runs, call, keep=True) for name, call in peers.items()}, repeats
    )
    return rows + [warm_start(folder, source, manifest, count, repeats)]


def warm_start(folder: Path, source: Path, manifest: Path, count: int, repeats: int) -> Ratio:
    """The start of a job that finds everything there, as the job's own code does it: a data file is found in the manifest, too."""
    from hpcutils.specs.job import load_job
    from hpcutils.train.stager import Found, stage

    (folder / "model.py").write_text("def build(): ...\n")
    (folder / "train.yaml").write_text(
        "name: x\ndata: {files: [{path: small/0000/0000000.jpg}], x: 0000000.jpg:a, y: 0000000.jpg:b}\n"
        "model: {function: model.py:build}\ntraining: {epochs: 1, batch_size: 1, loss: mse}\n"
        f"staging: {{manifest: {manifest.name}, source: small, cache: {folder}/warm}}\n"
    )
    job = load_job(folder / "train.yaml")

    def start() -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            stage(job, folder, Leaders(), Found())

    def stat_all() -> None:
        subprocess.run(["find", str(source), "-type", "f", "-printf", "%s %T@\\n"], check=True, stdout=subprocess.DEVNULL)

    start()
    return compare(f"stage, {count} small files, warm start", start, {"find -printf size, time": stat_all}, max(5, repeats))[0]


RANK = """
import json, os, shutil, subprocess, sys, time
from pathlib import Path
from mpi4py import MPI
from hpcutils.staging.leaders import Leaders
from hpcutils.staging.items import Settings
from hpcutils.staging.stage import stage_manifest

manifest, source, root, how = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3], f"bench-{os.getpid()}"), sys.argv[4]
world = MPI.COMM_WORLD
own = world.Dup()

def rchar():
    # Of this process and of children that it waited for.
    return int(Path("/proc/self/io").read_text().split()[1])

def copy():
    root.mkdir(parents=True)
    # cp alone is counted: what sha256sum reads is the copy.
    subprocess.run(["cp", "-r", source, f"{root}/x"], check=True)
    read = rchar()
    subprocess.run(["bash", "-c", f"find {root}/x -type f -print0 | xargs -0 sha256sum"], check=True, stdout=subprocess.DEVNULL)
    return read

def stage():
    outcome = stage_manifest(manifest, source, Settings(root), Leaders(own))
    # Sockets count as files: what came from the neighbours is no reading of the source.
    return rchar() - outcome.received_bytes // world.size, outcome

world.Barrier()
before, start = rchar(), time.perf_counter()
if how == "ours":
    after, outcome = stage()
    said = outcome.origin_bytes
else:
    after, said = copy(), None
world.Barrier()
seconds = time.perf_counter() - start
shutil.rmtree(root)
reads = world.gather(after - before)
if world.rank == 0:
    print(json.dumps({"seconds": seconds, "kernel_bytes": reads, "own_bytes": said}))
"""
HOW = ("ours", "cp -r; sha256sum")


def many_nodes(nodes: list[int], size_bytes: int, repeats: int) -> Iterator[dict[str, object]]:
    """The same dataset on the nodes of a sandbox: time over that of one node's copy, and how often the source was read."""
    from benchmarks.cluster import on_login, sandbox

    with sandbox(nodes=max(nodes), gpus=1) as shared:
        source = shared / "set"
        on_login("mkdir", str(source))
        on_login("bash", "-c", f"head -c {size_bytes} /dev/urandom > {source}/x")
        on_login("hpcutils", "stage", "manifest", str(source), "-o", f"{shared}/m.jsonl", "--segment-mib", "8")

        def run(count: int, how: str) -> dict[str, object]:
            words = ["python", "-c", RANK, f"{shared}/m.jsonl", str(source), "/tmp", how]
            srun = ["srun", "--mpi=pmix", f"-N{count}", f"-n{count}", "--export=ALL,OMPI_MCA_mpi_yield_when_idle=1"]
            return dict(json.loads(on_login(*srun, *words).splitlines()[-1]))

        for count in [1, *nodes]:
            # Interleaved: each run beside one node's copy made just before.
            runs = [(run(1, HOW[1]), *(run(count, how) for how in HOW)) for _ in range(repeats)]
            for place, how in enumerate(HOW, start=1):
                yield told(count, how, size_bytes, [(each[0], each[place]) for each in runs])


def told(count: int, how: str, size_bytes: int, pairs: list[tuple[dict, dict]]) -> dict[str, object]:
    """Return, and print, the row of one way on so many nodes: medians, least and most."""
    ratios = [own["seconds"] / one["seconds"] for one, own in pairs]
    read = [sum(own["kernel_bytes"]) / size_bytes for _, own in pairs]
    row: dict[str, object] = {
        "nodes": count, "how": how, "size_bytes": size_bytes, "cores": os.cpu_count(),
        "seconds": statistics.median(own["seconds"] for _, own in pairs),
        "over_one_copy": statistics.median(ratios), "over_min": min(ratios), "over_max": max(ratios),
        "times_read": statistics.median(read), "own_count": pairs[-1][1]["own_bytes"],
    }  # fmt: skip
    print(
        f"stage, {count:>2} nodes on {row['cores']} cores, {size_bytes >> 20} MiB: {how:<18} {row['seconds']:7.2f} s, "
        f"x{row['over_one_copy']:.2f} [{min(ratios):.2f}, {max(ratios):.2f}] of one node's cp + sha256sum, "
        f"source read {row['times_read']:.3f} x (kernel)",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size-mib", type=int, default=4096)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="Where source and cache are [a temporary folder]")
    parser.add_argument("--nodes", default="2,4,8,16" if os.geteuid() == 0 else "", help="Sandbox clusters; empty: none")
    parser.add_argument("--nodes-mib", type=int, default=256)
    parser.add_argument("--parts", default="file,small,nodes", help="Which of the three to run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows: list[Ratio] = []
    parts = {
        "file": functools.partial(one_file, size_bytes=given.size_mib << 20),
        "small": functools.partial(small_files, count=given.files),
    }
    for part in (functools.partial(call, repeats=given.repeats) for name, call in parts.items() if name in given.parts):
        with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
            rows += part(Path(scratch))
    nodes = [int(word) for word in given.nodes.split(",") if word and "nodes" in given.parts]
    clusters = list(many_nodes(nodes, given.nodes_mib << 20, given.repeats)) if nodes else []
    report(rows)
    if given.json:
        print("\n".join(map(json.dumps, clusters)))


if __name__ == "__main__":
    main()
