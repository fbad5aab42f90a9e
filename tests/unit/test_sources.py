"""Where bytes may come from: redirects, https, files, proxies, and what is not opened."""

from __future__ import annotations

import hashlib
import random
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from servers import (
    Site,
    answers,
    breaks_after,
    names_in,
    redirects,
    serving,
)

from hpcutils.errors import DataError, IntegrityError, SpecError
from hpcutils.staging.download import Patience, fetch
from hpcutils.staging.sources import Resume, Source

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


class TestHttps:
    @pytest.fixture
    def safe(self) -> Iterator[tuple[Site, trustme.CA]]:
        authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        with serving(authority) as running:
            yield running, authority

    @pytest.fixture
    def trusted(self, safe: tuple[Site, trustme.CA], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
        pem = tmp_path / "authority.pem"
        safe[1].cert_pem.write_to_path(str(pem))
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        return safe[0]

    def test_a_trusted_server(self, trusted: Site, target: Path) -> None:
        assert fetch(trusted.put("/x", BODY, breaks_after(HALF)), target, digest=SHA256, patience=FAST).resumed
        check_whole(target)

    def test_https_to_https_is_followed(self, trusted: Site, target: Path) -> None:
        trusted.put("/real", BODY)
        fetch(trusted.put("/x", b"", redirects("/real")), target, digest=SHA256, patience=FAST)
        check_whole(target)

    def test_https_to_http_is_refused(self, trusted: Site, site: Site, target: Path) -> None:
        plain = site.put("/x", BODY)
        with pytest.raises(DataError, match="from https to http is not followed"):
            fetch(trusted.put("/x", b"", redirects(plain)), target, digest=SHA256, patience=FAST)
        assert site.seen == []
        check_nothing(target)

    def test_http_to_https_is_followed(self, trusted: Site, site: Site, target: Path) -> None:
        fetch(site.put("/x", b"", redirects(trusted.put("/x", BODY))), target, digest=SHA256, patience=FAST)
        check_whole(target)

    def test_an_unknown_authority_is_refused_at_once(self, safe: tuple[Site, trustme.CA], target: Path) -> None:
        with pytest.raises(DataError, match="certificate is not valid"):
            fetch(safe[0].put("/x", BODY), target, patience=Patience(first_wait_s=60))
        assert safe[0].seen == []


def test_redirects_are_followed_with_the_range(site: Site, target: Path) -> None:
    site.put("/real", BODY, breaks_after(HALF))
    url = site.put("/x", b"", redirects("/real"), redirects("/real", 308))
    assert fetch(url, target, digest=SHA256, patience=FAST).resumed
    check_whole(target)


def test_a_circle_of_redirects_ends(site: Site, target: Path) -> None:
    url = site.put("/x", b"", redirects("/x"))
    site.repeat_last = True
    with pytest.raises(DataError, match="302"):
        fetch(url, target, patience=FAST)


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_a_redirect_leads_to_no_other_scheme(site: Site, target: Path, place: str) -> None:
    with pytest.raises(DataError):
        fetch(site.put("/x", b"", redirects(place)), target, patience=FAST)
    assert len(site.seen) == 1
    check_nothing(target)


class TestFiles:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        path = tmp_path / "자료 1%.bin"
        path.write_bytes(BODY)
        return path

    @pytest.mark.parametrize("form", ["{plain}", "file://{quoted}", "file://localhost{quoted}", "FILE://{quoted}"])
    def test_every_way_to_name_one(self, source: Path, target: Path, form: str) -> None:
        origin = form.format(plain=source, quoted=urllib.parse.quote(str(source)))
        result = fetch(origin, target, digest=SHA256)
        check_whole(target)
        assert (result.bytes_moved, result.digest) == (len(BODY), SHA256)

    def test_the_digest_is_checked(self, source: Path, target: Path) -> None:
        with pytest.raises(IntegrityError):
            fetch(str(source), target, digest="0" * 64)
        check_nothing(target)

    def test_one_that_is_not_there(self, tmp_path: Path, target: Path) -> None:
        with pytest.raises(DataError, match=r"cannot read .*missing"):
            fetch(str(tmp_path / "missing"), target)
        check_nothing(target)

    def test_a_folder(self, tmp_path: Path, target: Path) -> None:
        with pytest.raises(DataError, match="directory"):
            fetch(str(tmp_path), target)

    def test_one_on_another_host(self, target: Path) -> None:
        with pytest.raises(SpecError, match="three slashes"):
            fetch("file://server/data/x.bin", target)


@pytest.mark.parametrize("origin", ["ftp://h/x", "data:,x", "s3://b/x", "http:///x", "http://h:x/y", "https://u:p@h/x", ""])
def test_origins_that_are_not_opened(target: Path, origin: str) -> None:
    with pytest.raises(SpecError) as caught:
        fetch(origin, target)
    assert "u:p" not in str(caught.value)
    check_nothing(target)


def test_another_scheme_where_it_is_asked_for(target: Path) -> None:
    def open_memory(origin: str, resume: Resume | None, timeout_s: float) -> Source:
        rest = [BODY]

        def read_into(buffer: memoryview) -> int:
            block, rest[0] = rest[0][: len(buffer)], rest[0][len(buffer) :]
            buffer[: len(block)] = block
            return len(block)

        return Source(read_into, lambda: None, total_bytes=len(BODY))

    fetch("memory:x", target, digest=SHA256, also={"memory": open_memory})
    check_whole(target)


def test_a_secret_in_the_query_stays_out_of_messages(site: Site, target: Path) -> None:
    with pytest.raises(DataError) as caught:
        fetch(site.put("/x", BODY, answers(403)) + "?signature=hush", target, patience=FAST)
    assert "hush" not in str(caught.value)
    assert site.seen[0].path == "/x?signature=hush"


def test_letters_outside_ascii_and_quoted_ones(site: Site, target: Path) -> None:
    site.put("/%EC%9E%90%EB%A3%8C%201", BODY)
    fetch(site.url + "/자료%201", target, digest=SHA256, patience=FAST)
    check_whole(target)


def test_the_proxy_of_the_environment_is_used(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", site.url)
    site.files["http://data.invalid/x"] = BODY
    fetch("http://data.invalid/x", target, digest=SHA256, patience=FAST)
    check_whole(target)
