"""Staging beside what people do by hand: `cp` and `sha256sum`, pooch, Keras' get_file; on one node and on many.

    python -m benchmarks.bench_staging [--size-mib 1024] [--files 20000] [--folder DIR] [--nodes 2,4,8,16] [--json]

Ours flushes every file to the disk before the dataset gets its name; the peers leave it in memory, so they are run with `sync` too.
With `--nodes` (and root) the same runs on a sandbox cluster, whose nodes share this machine's cores, memory and disk: what is
told there is how often the source was read, and the time beside that of copying on each node. The nodes keep their copies in memory
there, or the one disk under all of them would be all that is measured. How often the source is read is hpcutils' own count;
tests/real/test_staging_mpi.py holds it to the kernel's.
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
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.bench_get_file import serving
from benchmarks.harness import Ratio, compare, report, timed
from hpcutils.staging.find import find_files
from hpcutils.staging.leaders import Leaders
from hpcutils.staging.manifest import write_manifest
from hpcutils.staging.stage import Item, Settings, stage_item, stage_manifest

REPEATS = 5


def fresh(folder: Path, call: Callable[[Path], object]) -> Callable[[], object]:
    """Return `call` on a new folder each time; the last one is removed before the clock starts again."""
    numbers = itertools.count()
    last: list[Path] = []

    def run() -> None:
        place = folder / f"run-{next(numbers)}-{id(call)}"
        place.mkdir(parents=True)
        last.append(place)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            call(place)

    def cleaned() -> None:
        run()
        shutil.rmtree(last.pop())

    return cleaned


def shell(command: str) -> Callable[[Path], object]:
    return lambda place: subprocess.run(["bash", "-c", command, "bash", str(place)], check=True, stdout=subprocess.DEVNULL)


def write_random(path: Path, size_bytes: int) -> None:
    with path.open("wb") as stream:
        for start in range(0, size_bytes, 64 << 20):
            stream.write(os.urandom(min(64 << 20, size_bytes - start)))


def one_file(folder: Path, size_bytes: int) -> list[Ratio]:
    """A large file from a folder, with a manifest and with a sha256 alone."""
    source = folder / "source"
    source.mkdir()
    write_random(source / "x", size_bytes)
    manifest = write_manifest(find_files([source]), folder / "m.jsonl").path
    with (source / "x").open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    by_hand = f'cp {source}/x "$1/x" && sha256sum "$1/x"'
    peers = {"cp; sha256sum": shell(by_hand), "cp; sync; sha256sum": shell(by_hand.replace("&&", '&& sync "$1/x" &&'))}
    peers = {name: fresh(folder / "runs", call) for name, call in peers.items()}
    size = f"{size_bytes >> 20} MiB"
    item = Item("x", str(source / "x"), sha256)
    rows = compare(
        f"stage, one file, {size}, manifest",
        fresh(folder / "runs", lambda place: stage_manifest(manifest, str(source), Settings(place / "cache"), Leaders())),
        peers,
        REPEATS,
    )
    rows += compare(
        f"stage, one file, {size}, sha256",
        fresh(folder / "runs", lambda place: stage_item(item, Settings(place / "cache"), Leaders())),
        peers,
        REPEATS,
    )
    return rows + over_http(folder, source, sha256, size)


def over_http(folder: Path, source: Path, sha256: str, size: str) -> list[Ratio]:
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
        ours = fresh(folder / "runs", lambda place: stage_item(Item("x", f"{url}/x", sha256), Settings(place / "cache"), Leaders()))
        runs = {name: fresh(folder / "runs", call) for name, call in peers.items()}
        return compare(f"stage, one file, {size}, http", ours, runs, REPEATS)


def small_files(folder: Path, count: int) -> list[Ratio]:
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
    ours = fresh(folder / "runs", lambda place: stage_manifest(manifest, str(source), Settings(place / "cache"), Leaders()))
    rows = []
    for name, call in peers.items():
        rows += compare(f"stage, {count} small files", ours, {name: fresh(folder / "runs", call)}, 2)
    settings = Settings(folder / "warm")
    stage_manifest(manifest, str(source), settings, Leaders())
    seconds = min(timed(lambda: stage_manifest(manifest, str(source), settings, Leaders())) for _ in range(5))
    print(f"stage, {count} small files, warm start: {seconds * 1e3:.0f} ms", flush=True)
    return rows


RANK = """
import json, os, shutil, subprocess, sys, time
from pathlib import Path
from mpi4py import MPI
from hpcutils.staging.leaders import Leaders
from hpcutils.staging.stage import Settings, stage_manifest

manifest, source, root, how = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3], f"bench-{os.getpid()}"), sys.argv[4]
world = MPI.COMM_WORLD
world.Barrier()
start = time.perf_counter()
if how == "ours":
    outcome = stage_manifest(manifest, source, Settings(root), Leaders(world.Dup()))
    read = outcome.origin_bytes // world.size
else:
    root.mkdir(parents=True)
    subprocess.run(["bash", "-c", f"cp -r {source} {root}/x && find {root}/x -type f -print0 | xargs -0 sha256sum"], check=True,
                   stdout=subprocess.DEVNULL)
    read = sum(path.stat().st_size for path in Path(source).rglob("*") if path.is_file())
world.Barrier()
seconds = time.perf_counter() - start
shutil.rmtree(root)
total = world.reduce(read)
if world.rank == 0:
    print(json.dumps({"seconds": seconds, "read_bytes": total}))
"""


def many_nodes(nodes: list[int], size_bytes: int) -> Iterator[dict[str, object]]:
    """The same dataset on the nodes of a sandbox: time, and how often the source was read."""
    from benchmarks.cluster import on_login, sandbox

    with sandbox(nodes=max(nodes), gpus=1) as shared:
        source = shared / "set"
        on_login("mkdir", str(source))
        on_login("bash", "-c", f"head -c {size_bytes} /dev/urandom > {source}/x")
        on_login("hpcutils", "stage", "manifest", str(source), "-o", f"{shared}/m.jsonl", "--segment-mib", "8")
        for count in [1, *nodes]:
            for how in ("ours", "cp -r; sha256sum"):
                words = ["python", "-c", RANK, f"{shared}/m.jsonl", str(source), "/tmp", how]
                srun = ["srun", "--mpi=pmix", f"-N{count}", f"-n{count}", "--export=ALL,OMPI_MCA_mpi_yield_when_idle=1"]
                facts = json.loads(on_login(*srun, *words).splitlines()[-1])
                row = {"nodes": count, "how": how, "seconds": round(facts["seconds"], 2), "size_bytes": size_bytes}
                row["times_read"] = round(facts["read_bytes"] / size_bytes, 3)
                print(f"stage, {count:>2} nodes, {size_bytes >> 20} MiB: {how:<18} {facts['seconds']:7.2f} s, "
                      f"source read {row['times_read']:.2f} x", flush=True)  # fmt: skip
                yield row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="Where source and cache are [a temporary folder]")
    parser.add_argument("--nodes", default="2,4" if os.geteuid() == 0 else "", help="Sandbox clusters; empty: none")
    parser.add_argument("--nodes-mib", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows: list[Ratio] = []
    for part in (functools.partial(one_file, size_bytes=given.size_mib << 20), functools.partial(small_files, count=given.files)):
        with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
            rows += part(Path(scratch))
    nodes = [int(word) for word in given.nodes.split(",") if word]
    clusters = list(many_nodes(nodes, given.nodes_mib << 20)) if nodes else []
    report(rows)
    if given.json:
        print("\n".join(map(json.dumps, clusters)))


if __name__ == "__main__":
    main()
