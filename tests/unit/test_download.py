"""A transfer from a server or a disk that misbehaves: real sockets, real files."""

from __future__ import annotations

import hashlib
import random
import re
import resource
import socket
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from servers import (
    Site,
    answers,
    breaks_after,
    chunked,
    dated,
    ignores_range,
    names_in,
    sends,
    serving,
    stalls_after,
)

from hpcutils.errors import DataError, IntegrityError, SpecError
from hpcutils.staging.download import BLOCK_BYTES, WRITE_BACK_BYTES, Patience, fetch

BODY = random.Random(1).randbytes(3_000_000)
HALF = 1_500_000
SHA256 = hashlib.sha256(BODY).hexdigest()
FAST = Patience(tries=4, first_wait_s=0.01, timeout_s=5)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as running:
        yield running


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "x.bin"


def check_whole(target: Path) -> None:
    assert target.read_bytes() == BODY
    assert names_in(target.parent) == [target.name]


def check_nothing(target: Path) -> None:
    assert names_in(target.parent) == []


def test_a_good_server(site: Site, target: Path) -> None:
    result = fetch(site.put("/x", BODY), target, digest=SHA256, patience=FAST)
    check_whole(target)
    assert (result.bytes_moved, result.digest, result.resumed) == (len(BODY), SHA256, False)
    assert site.seen[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_sizes_around_a_block(site: Site, target: Path, size: int) -> None:
    result = fetch(site.put("/x", BODY[:size]), target, algorithm="md5", patience=FAST)
    assert target.read_bytes() == BODY[:size]
    assert result.digest == hashlib.md5(BODY[:size]).hexdigest()


def test_a_file_of_several_write_backs(site: Site, target: Path) -> None:
    body = BODY * (3 * WRITE_BACK_BYTES // len(BODY))
    result = fetch(site.put("/x", body, breaks_after(WRITE_BACK_BYTES + 5)), target, patience=FAST)
    assert result.digest == hashlib.sha256(target.read_bytes()).hexdigest() == hashlib.sha256(body).hexdigest()


def test_a_broken_connection_is_continued_where_it_broke(site: Site, target: Path) -> None:
    result = fetch(site.put("/x", BODY, breaks_after(HALF)), target, digest=SHA256, patience=FAST)
    check_whole(target)
    assert site.ranges() == [None, f"bytes={HALF}-"]
    assert site.seen[1].headers["if-range"] == f'"{hashlib.md5(BODY).hexdigest()}"'
    assert (result.bytes_moved, result.resumed) == (len(BODY), True)


def test_a_connection_that_breaks_often_is_continued_each_time(site: Site, target: Path) -> None:
    # More breaks than tries: only those in a row, with nothing new between them, count.
    url = site.put("/x", BODY, *[breaks_after(400_000)] * 7)
    result = fetch(url, target, digest=SHA256, patience=FAST)
    check_whole(target)
    assert len(site.seen) == 8
    assert result.bytes_moved == len(BODY)


def test_a_reset_connection_loses_a_block_at_most(site: Site, target: Path) -> None:
    result = fetch(site.put("/x", BODY, breaks_after(HALF, reset=True)), target, digest=SHA256, patience=FAST)
    check_whole(target)
    assert result.resumed
    assert int((site.ranges()[1] or "").removeprefix("bytes=").removesuffix("-")) > HALF - BLOCK_BYTES


def test_a_server_that_ignores_range_is_read_from_the_start(site: Site, target: Path) -> None:
    url = site.put("/x", BODY, breaks_after(HALF), ignores_range())
    result = fetch(url, target, digest=SHA256, patience=FAST)
    check_whole(target)
    assert (result.bytes_moved, result.resumed) == (HALF + len(BODY), False)


def test_a_file_that_changed_meanwhile_comes_whole_and_new(site: Site, target: Path) -> None:
    url = site.put("/x", BODY, breaks_after(HALF, etag='"old"'))
    result = fetch(url, target, digest=SHA256, patience=FAST)
    check_whole(target)
    assert site.seen[1].headers["if-range"] == '"old"'
    assert not result.resumed


def test_a_file_that_became_shorter_has_no_old_tail(site: Site, target: Path) -> None:
    short = BODY[:1000]
    url = site.put("/x", BODY, breaks_after(HALF), sends(200, short, Content_Length=len(short)))
    assert fetch(url, target, patience=FAST).digest == hashlib.sha256(short).hexdigest()
    assert target.read_bytes() == short


@pytest.mark.parametrize(
    ("etag", "content_range"),
    [
        ('"new"', f"bytes {HALF}-{len(BODY) - 1}/{len(BODY)}"),
        (f'"{hashlib.md5(BODY).hexdigest()}"', f"bytes {HALF - 1}-{len(BODY) - 1}/{len(BODY)}"),
        (f'"{hashlib.md5(BODY).hexdigest()}"', f"bytes {HALF}-{len(BODY)}/{len(BODY) + 1}"),
        (f'"{hashlib.md5(BODY).hexdigest()}"', None),
    ],
    ids=["changed ETag", "another start", "another length", "no Content-Range"],
)
def test_a_part_of_another_file_is_not_believed(site: Site, target: Path, etag: str, content_range: str | None) -> None:
    rest = b"!" * (len(BODY) - HALF)
    lie = sends(206, rest, ETag=etag, Content_Range=content_range, Content_Length=len(rest))
    result = fetch(site.put("/x", BODY, breaks_after(HALF), lie), target, digest=SHA256, patience=FAST)
    check_whole(target)
    assert site.ranges() == [None, f"bytes={HALF}-", None]
    assert not result.resumed


def test_416_starts_over(site: Site, target: Path) -> None:
    fetch(site.put("/x", BODY, breaks_after(HALF), answers(416)), target, digest=SHA256, patience=FAST)
    check_whole(target)
    assert site.ranges() == [None, f"bytes={HALF}-", None]


def test_416_to_a_whole_request_is_final(site: Site, target: Path) -> None:
    with pytest.raises(DataError, match="416"):
        fetch(site.put("/x", BODY, answers(416)), target, patience=FAST)
    assert len(site.seen) == 1
    check_nothing(target)


def test_a_body_that_is_always_short_is_an_error(site: Site, target: Path) -> None:
    url = site.put("/x", BODY, ignores_range(HALF))
    site.repeat_last = True
    with pytest.raises(DataError, match=f"{HALF} bytes came of {len(BODY)}") as caught:
        fetch(url, target, patience=FAST)
    assert len(site.seen) == FAST.tries
    assert "proxy" in str(caught.value)
    check_nothing(target)


def test_without_a_validator_a_broken_file_is_read_from_the_start(site: Site, target: Path) -> None:
    weak = breaks_after(HALF, etag='W/"same"')
    result = fetch(site.put("/x", BODY, weak), target, digest=SHA256, patience=FAST)
    check_whole(target)
    assert site.ranges() == [None, None]
    assert result.bytes_moved == HALF + len(BODY)


@pytest.mark.parametrize(("age_s", "resumed"), [(3600, True), (0, False)])
def test_a_date_continues_only_when_it_is_old_enough(site: Site, target: Path, age_s: int, resumed: bool) -> None:
    modified = formatdate(Path(__file__).stat().st_atime - 10**6, usegmt=True) if age_s else formatdate(usegmt=True)
    url = site.put("/x", BODY, dated(modified, HALF), dated(modified))
    result = fetch(url, target, digest=SHA256, patience=FAST)
    check_whole(target)
    assert result.resumed is resumed


def test_a_chunked_body(site: Site, target: Path) -> None:
    fetch(site.put("/x", BODY, chunked()), target, digest=SHA256, patience=FAST)
    check_whole(target)


def test_a_chunked_body_that_breaks_is_noticed_and_continued(site: Site, target: Path) -> None:
    fetch(site.put("/x", BODY, chunked(stop_after=HALF)), target, patience=FAST)
    check_whole(target)
    assert len(site.seen) == 2


def test_a_server_that_falls_silent_is_left_and_continued(site: Site, target: Path) -> None:
    patience = Patience(first_wait_s=0.01, timeout_s=0.3)
    result = fetch(site.put("/x", BODY, stalls_after(HALF, seconds=2)), target, digest=SHA256, patience=patience)
    check_whole(target)
    assert result.resumed


def test_a_busy_server_is_asked_again_after_the_time_it_wants(site: Site, target: Path) -> None:
    url = site.put("/x", BODY, answers(503, Retry_After=3600), answers(429))
    fetch(url, target, digest=SHA256, patience=Patience(first_wait_s=0.01, longest_wait_s=0.05))
    check_whole(target)
    assert len(site.seen) == 3


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_server_that_says_no_is_asked_once(site: Site, target: Path, status: int) -> None:
    with pytest.raises(DataError, match=str(status)):
        fetch(site.put("/x", BODY, answers(status)), target, patience=FAST)
    assert len(site.seen) == 1
    check_nothing(target)


def test_nobody_listens(site: Site, target: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(DataError, match="gave up after 4 tries"):
        fetch(f"http://127.0.0.1:{port}/x", target, patience=FAST)
    check_nothing(target)


def test_other_bytes_than_expected_are_not_published(site: Site, target: Path) -> None:
    with pytest.raises(IntegrityError, match=SHA256) as caught:
        fetch(site.put("/x", BODY[:-1]), target, digest=SHA256, patience=FAST)
    assert hashlib.sha256(BODY[:-1]).hexdigest() in str(caught.value)
    assert isinstance(caught.value, ValueError)
    check_nothing(target)


def test_a_failure_keeps_the_file_that_was_there(site: Site, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(IntegrityError):
        fetch(site.put("/x", BODY), target, digest="0" * 64, patience=FAST)
    assert target.read_bytes() == b"old"
    assert names_in(target.parent) == [target.name]


def test_digests_in_either_case(site: Site, target: Path) -> None:
    assert fetch(site.put("/x", BODY), target, digest=SHA256.upper(), patience=FAST).digest == SHA256


@pytest.mark.parametrize(("digest", "algorithm"), [("ab", "sha256"), ("g" * 64, "sha256"), (SHA256, "md5"), (None, "crc")])
def test_what_is_no_digest_is_refused_before_anything_moves(site: Site, target: Path, digest: str | None, algorithm: str) -> None:
    with pytest.raises(SpecError):
        fetch(site.put("/x", BODY), target, digest=digest, algorithm=algorithm)
    assert site.seen == []


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Let no file grow beyond 100 kB, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize("count", [1, 10], ids=["at the last block", "early"])
def test_a_full_disk_leaves_nothing(site: Site, target: Path, count: int) -> None:
    body = BODY[:200_000] if count == 1 else BODY * count
    recorder = Recorder()
    with pytest.raises(DataError, match=r"cannot put .*x\.bin in place: File too large"):
        fetch(site.put("/x", body), target, progress=recorder, patience=FAST)
    assert len(site.seen) == 1
    assert count == 1 or recorder.states[-1][0] < len(body), "went on although nothing could be written"
    check_nothing(target)


def test_a_folder_that_cannot_be_made(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot put"):
        fetch(site.put("/x", BODY), tmp_path / "file" / "x.bin")
    assert site.seen == []


class Recorder:
    def __init__(self) -> None:
        self.states: list[tuple[int, int | None]] = []
        self.closed = 0

    def update(self, done_bytes: int, total_bytes: int | None) -> None:
        self.states.append((done_bytes, total_bytes))

    def close(self) -> None:
        self.closed += 1


def test_progress_counts_what_is_there(site: Site, target: Path) -> None:
    recorder = Recorder()
    fetch(site.put("/x", BODY, breaks_after(HALF)), target, progress=recorder, patience=FAST)
    counts = [done for done, _ in recorder.states]
    assert counts == sorted(counts)
    assert recorder.states[-1] == (len(BODY), len(BODY))
    assert recorder.closed == 1


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "exa mple", "x" * 70 + ".invalid"])
def test_a_host_that_cannot_be_is_asked_once(tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine without name servers says (try again) is another matter: this is their answer that there is none."""
    asked = []

    def resolve(name: str, *args: object, **kwargs: object) -> list[object]:
        asked.append(name)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises((DataError, SpecError), match=re.escape(host[:20])):
        fetch(f"http://{host}/x", tmp_path / "x")
    assert len(asked) <= 1
    assert list(tmp_path.iterdir()) == []


def test_a_name_server_that_is_busy_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(name: str, *args: object, **kwargs: object) -> list[object]:
        asked.append(name)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(DataError, match="gave up after 3 tries"):
        fetch("http://example.invalid/x", tmp_path / "x", patience=Patience(3, 0.01))
    assert len(asked) == 3
