"""`get_file` beside pooch and Keras 3: 256 MiB over http from this machine, sha256 verified by each.

Run it: `python -m benchmarks.bench_get_file [--json]`. Each call downloads into a new folder. Ours also flushes the file
to the disk before it gets its name; the peers do not.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import io
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.harness import compare, report

SIZE_BYTES = 256 << 20
SMALL_BYTES = 1 << 20


class Handler(http.server.SimpleHTTPRequestHandler):
    """Sends by the kernel: the server must not be what is measured."""

    def copyfile(self, source: io.BufferedReader, outputfile: io.BufferedWriter) -> None:  # type: ignore[override]
        outputfile.flush()
        offset, size = 0, os.fstat(source.fileno()).st_size
        while offset < size:
            offset += os.sendfile(self.connection.fileno(), source.fileno(), offset, size - offset)

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve(folder: str) -> None:
    """Serve `folder` on a free port of 127.0.0.1, and print the port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Run the server in a process of its own; yield its URL."""
    argv = [sys.executable, "-m", "benchmarks.bench_get_file", "--serve", str(folder)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.terminate()


def calls(url: str, sha256: str, folder: Path) -> dict[str, Callable[[], object]]:
    """Return a call of each library that downloads and verifies `url`, each time into a new folder below `folder`."""
    import keras
    import pooch

    from hpcutils.staging.get_file import get_file

    pooch.get_logger().setLevel("ERROR")
    blocks = pooch.HTTPDownloader(chunk_size=SMALL_BYTES)
    numbers = itertools.count()

    def fresh(call: Callable[[Path], object]) -> Callable[[], object]:
        def run() -> None:
            place = folder / str(next(numbers))
            place.mkdir(parents=True)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                call(place)

        return run

    found = {
        "hpcutils": lambda place: get_file("x", url, file_hash=sha256, cache_dir=place),
        "keras.utils.get_file": lambda place: keras.utils.get_file("x", url, file_hash=sha256, cache_dir=place),
        "pooch.retrieve": lambda place: pooch.retrieve(url, f"sha256:{sha256}", "x", place),
        "pooch, blocks of 1 MiB": lambda place: pooch.retrieve(url, f"sha256:{sha256}", "x", place, downloader=blocks),
    }
    return {name: fresh(call) for name, call in found.items()}


def main() -> None:
    os.environ["no_proxy"] = "127.0.0.1"
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch, "site")
        site.mkdir()
        with serving(site) as url:
            for name, size, repeats in (("256 MiB", SIZE_BYTES, 7), ("1 MiB", SMALL_BYTES, 15)):
                body = os.urandom(size)
                (site / "x").write_bytes(body)
                peers = calls(f"{url}/x", hashlib.sha256(body).hexdigest(), Path(scratch, "cache"))
                ours = peers.pop("hpcutils")
                for peer, call in peers.items():
                    rows += compare(f"get_file, {name}, http, sha256", ours, {peer: call}, repeats)
                    # Not within a call: removing 256 MiB takes as long as writing some of them.
                    shutil.rmtree(Path(scratch, "cache"))
    report(rows)


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1:2] == ["--serve"] else main()
