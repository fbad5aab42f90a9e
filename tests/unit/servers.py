"""A web server on 127.0.0.1 that behaves well until it is told otherwise, request by request."""

from __future__ import annotations

import hashlib
import http.server
import re
import socket
import ssl
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trustme


class Handler(http.server.BaseHTTPRequestHandler):
    """One request; `server.owner` knows what is to be done with it."""

    protocol_version = "HTTP/1.1"
    server: _Threads

    def do_GET(self) -> None:
        self.close_connection = True
        site = self.server.owner
        with site.lock:
            site.seen.append(Seen(self.path, {name.lower(): value for name, value in self.headers.items()}))
            quirk = site.next_quirk(self.path.partition("?")[0])
        body = site.files.get(self.path.partition("?")[0])
        if body is None and quirk is honest:
            quirk = answers(404)
        # Clients that give up are what half of the tests are about.
        with suppress(BrokenPipeError, ConnectionResetError):
            quirk(self, body or b"")

    def log_message(self, format: str, *args: object) -> None:
        pass

    def head(self, status: int, **headers: object) -> None:
        """Send a status and headers; `content_length=3` becomes `Content-Length: 3`."""
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def reset(self) -> None:
        """Break the connection with a reset instead of an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


Quirk = Callable[[Handler, bytes], None]


@dataclass(frozen=True)
class Seen:
    """A request that came; header names in lower case."""

    path: str
    headers: dict[str, str]


class _Threads(http.server.ThreadingHTTPServer):
    owner: Site
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@dataclass
class Site:
    """What the server holds, and how it is to misbehave.

    Args:
        url: Where it is.
        files: Path to content.
        quirks: Path to behaviours, used one a request, in order; afterwards the server is honest.
        repeat_last: Keep to the last quirk for ever.
        seen: Every request so far.
    """

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    quirks: defaultdict[str, list[Quirk]] = field(default_factory=lambda: defaultdict(list))
    repeat_last: bool = False
    seen: list[Seen] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, path: str, body: bytes, *quirks: Quirk) -> str:
        """Hold `body` under `path` and return its URL."""
        self.files[path], self.quirks[path] = body, list(quirks)
        return self.url + path

    def next_quirk(self, path: str) -> Quirk:
        queue = self.quirks[path]
        if self.repeat_last and len(queue) == 1:
            return queue[0]
        return queue.pop(0) if queue else honest

    def ranges(self) -> list[str | None]:
        """Return the Range header of each request so far."""
        return [request.headers.get("range") for request in self.seen]


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, hidden ones included, sorted."""
    return sorted(path.name for path in folder.iterdir())


def etag_of(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


def honest(handler: Handler, body: bytes, etag: str | None = None, stop_after: int | None = None) -> None:
    """Answer as RFC 9110 has it: ETag, Range and If-Range; optionally stop in the middle of the body."""
    etag = etag or etag_of(body)
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
    asked = asked if handler.headers.get("If-Range", etag) == etag else None
    start = int(asked[1]) if asked else 0
    end = min(int(asked[2]) + 1, len(body)) if asked and asked[2] else len(body)
    if start and start >= len(body):
        handler.head(416, Content_Range=f"bytes */{len(body)}", Content_Length=0)
        return
    partial = start > 0 or end < len(body)
    content_range = f"bytes {start}-{end - 1}/{len(body)}" if partial else None
    rest = body[start:end]
    handler.head(206 if partial else 200, Content_Length=len(rest), ETag=etag, Content_Range=content_range)
    handler.wfile.write(rest[:stop_after])


def breaks_after(count: int, *, reset: bool = False, etag: str | None = None) -> Quirk:
    """Promise everything, send `count` bytes, and hang up."""

    def quirk(handler: Handler, body: bytes) -> None:
        honest(handler, body, etag=etag, stop_after=count)
        if reset:
            time.sleep(0.05)
            handler.reset()

    return quirk


def ignores_range(count: int | None = None) -> Quirk:
    """Send the whole file whatever was asked, or its first `count` bytes."""

    def quirk(handler: Handler, body: bytes) -> None:
        handler.head(200, Content_Length=len(body), ETag=etag_of(body))
        handler.wfile.write(body[:count])

    return quirk


def answers(status: int, **headers: object) -> Quirk:
    """Answer with a status and nothing else."""
    return lambda handler, body: handler.head(status, Content_Length=0, **headers)


def redirects(url: str, status: int = 302) -> Quirk:
    return answers(status, Location=url)


def sends(status: int, body: bytes, **headers: object) -> Quirk:
    """Answer with exactly these headers and these bytes."""

    def quirk(handler: Handler, _: bytes) -> None:
        handler.head(status, **headers)
        handler.wfile.write(body)

    return quirk


def dated(modified: str, stop_after: int | None = None) -> Quirk:
    """Know the file by its date only."""

    def quirk(handler: Handler, body: bytes) -> None:
        start = 0
        if handler.headers.get("If-Range") == modified:
            start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        content_range = f"bytes {start}-{len(body) - 1}/{len(body)}" if start else None
        rest = body[start:]
        headers = {"Content_Range": content_range, "Last_Modified": modified, "Content_Length": len(rest)}
        handler.head(206 if start else 200, **headers)
        handler.wfile.write(rest[:stop_after])

    return quirk


def chunked(stop_after: int | None = None) -> Quirk:
    """Send the body in chunks of 1000 bytes, without saying how long it is."""

    def quirk(handler: Handler, body: bytes) -> None:
        handler.head(200, Transfer_Encoding="chunked", ETag=etag_of(body))
        for start in range(0, len(body) if stop_after is None else stop_after, 1000):
            piece = body[start : start + 1000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if stop_after is None:
            handler.wfile.write(b"0\r\n\r\n")

    return quirk


def slow(seconds: float, then: Quirk = honest) -> Quirk:
    """Think for a while, then answer."""

    def quirk(handler: Handler, body: bytes) -> None:
        time.sleep(seconds)
        then(handler, body)

    return quirk


def stalls_after(count: int, seconds: float) -> Quirk:
    """Send `count` bytes and fall silent with the connection open."""

    def quirk(handler: Handler, body: bytes) -> None:
        honest(handler, body, stop_after=count)
        handler.wfile.flush()
        time.sleep(seconds)

    return quirk


@contextmanager
def serving(authority: trustme.CA | None = None) -> Iterator[Site]:
    """Run a server for the length of a `with`; https when an authority signs its certificate."""
    server = _Threads(("127.0.0.1", 0), Handler)
    scheme = "http"
    if authority is not None:
        scheme = "https"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.owner = site = Site(f"{scheme}://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            # A proxy of this machine is not on the way to this machine.
            patch.setenv("no_proxy", "127.0.0.1")
            yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
