"""http and https: one request, its answer checked, its body ready to be read. RFC 9110 is the source of the rules.

The proxies of the environment (`https_proxy`, `no_proxy`) are used: the nodes of many clusters reach nothing without.
"""

from __future__ import annotations

import email.utils
import http.client
import re
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request
from email.message import Message
from typing import IO

from hpcutils import __version__
from hpcutils.errors import DataError, HpcutilsError, SpecError
from hpcutils.staging.sources import Broken, Resume, Source, shown

# Answers that may be another one in a moment.
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
# The name server knows no such host; a name server that does not answer is EAI_AGAIN.
NO_SUCH_HOST = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
# A file that changed twice within a second keeps its date: RFC 9110 8.8.2.2 wants a minute between date and answer.
DATE_IS_STRONG_AFTER_S = 60


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never to a place where the bytes travel less safely than was asked."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:  # fmt: skip
        scheme = urllib.parse.urlsplit(newurl).scheme.lower()
        if scheme not in ("http", "https") or (req.type == "https" and scheme == "http"):
            fp.close()
            raise DataError(
                f"{shown(req.full_url)} redirects to {shown(newurl)}: from {req.type} to {scheme} is not followed",
                "give an https URL that stays https, or the http URL itself together with its file_hash",
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_web(url: str, resume: Resume | None, timeout_s: float) -> Source:
    """Ask for `url`, from `resume.offset` on if the file there is still the same.

    Args:
        url: http or https; letters outside ASCII are quoted.
        resume: Where to go on, or `None` for the whole file.
        timeout_s: Seconds of silence after which the connection counts as broken.

    Returns:
        A source at `resume.offset`, or at 0 when the server sends the whole file.

    Raises:
        Broken: Another try may succeed.
        SpecError: The URL cannot be asked for.
        DataError: There is no such host, the server says no, its certificate is not valid, or it redirects from https to http.
    """
    request = urllib.request.Request(_quoted(url), headers=_headers(resume))
    try:
        response = _director().open(request, timeout=timeout_s)
    except urllib.error.HTTPError as exc:
        exc.close()
        raise _refusal(url, exc, resume) from exc
    except (http.client.InvalidURL, UnicodeError) as exc:
        raise SpecError(f"{shown(url)}: not a URL that can be asked for: {exc}", "a URL reads https://host:port/path") from exc
    except (urllib.error.URLError, http.client.HTTPException, OSError) as exc:
        raise _unreachable(url, getattr(exc, "reason", None) or exc) from exc
    try:
        return _checked(response, resume)
    except Broken:
        response.close()
        raise


def _director() -> urllib.request.OpenerDirector:
    """Return what follows redirects and proxies, and knows no scheme but these two."""
    director = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(), _Redirects(),
        urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler(), urllib.request.UnknownHandler(),
    ):  # fmt: skip
        director.add_handler(handler)
    return director


def _quoted(url: str) -> str:
    """Quote what may not stand in a request line; what is quoted already stays as it is."""
    parts = urllib.parse.urlsplit(url)
    path, query = (urllib.parse.quote(part, safe="/%:@!$&'()*+,;=~?") for part in (parts.path, parts.query))
    return parts._replace(path=path, query=query).geturl()


def _headers(resume: Resume | None) -> dict[str, str]:
    # identity: the length and the digest are those of the file, not of a compressed copy of it.
    headers = {"User-Agent": f"hpcutils/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"}
    if resume is not None:
        last = "" if resume.stop_bytes is None else resume.stop_bytes - 1
        headers |= {"Range": f"bytes={resume.offset}-{last}", "If-Range": resume.validator}
    return headers


def _refusal(url: str, exc: urllib.error.HTTPError, resume: Resume | None) -> HpcutilsError | Broken:
    """Return what an answer of 3xx (not followed), 4xx or 5xx means."""
    said = f"{shown(url)}: the server answered {exc.code} {http.client.responses.get(exc.code, '')}".rstrip()
    if exc.code == 416 and resume is not None:
        return Broken(said, start_over=True)
    if exc.code in TRANSIENT:
        return Broken(said, wait_s=_seconds(exc.headers.get("Retry-After")))
    return DataError(said, "check the URL, and whether it needs a login")


def _seconds(retry_after: str | None) -> float:
    """Return a Retry-After in seconds; its other form, a date, counts as none."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0


def _unreachable(url: str, reason: object) -> HpcutilsError | Broken:
    if isinstance(reason, ssl.SSLCertVerificationError):
        said = f"{shown(url)}: the certificate is not valid: {reason.verify_message}"
        return DataError(said, "set SSL_CERT_FILE to your site's authorities, if it has its own")
    if isinstance(reason, socket.gaierror) and reason.errno in NO_SUCH_HOST:
        return DataError(f"{shown(url)}: {reason.strerror}", "check the spelling of the host, and whether this node may reach it")
    return Broken(f"{shown(url)}: {reason or type(reason).__name__}")


def _checked(response: http.client.HTTPResponse, resume: Resume | None) -> Source:
    """Return the body of a 200, or of a 206 that continues `resume`."""
    if response.status == 206:
        return _continued(response, resume)
    if response.status != 200:
        raise Broken(f"the server answered {response.status} without a file", start_over=True)
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() and not response.chunked else None
    return _source(response, 0, total, validator_of(response.headers))


def _continued(response: http.client.HTTPResponse, resume: Resume | None) -> Source:
    """Return the rest of the file; a server that sends another part, or a part of another file, is not believed."""
    found = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if resume is None or found is None or int(found[1]) != resume.offset:
        raise Broken("the server sent a part that was not asked for", start_over=True)
    name = "ETag" if resume.validator.startswith('"') else "Last-Modified"
    total = resume.total_bytes if found[2] == "*" else int(found[2])
    same_length = resume.total_bytes in (None, total)
    if not same_length or response.headers.get(name, resume.validator) != resume.validator:
        raise Broken("the file changed on the server meanwhile", start_over=True)
    return _source(response, resume.offset, total, resume.validator)


def _source(response: http.client.HTTPResponse, offset: int, total: int | None, validator: str | None) -> Source:
    def read_into(buffer: memoryview) -> int:
        try:
            return response.readinto(buffer)
        except (http.client.HTTPException, OSError) as exc:
            raise Broken(f"the connection broke: {exc or type(exc).__name__}") from exc

    return Source(read_into, response.close, offset, total, validator)


def validator_of(headers: Message) -> str | None:
    """Return the mark that `If-Range` may carry: a strong ETag, or a date that is old enough to be strong."""
    etag = headers.get("ETag", "")
    if etag.startswith('"'):
        return str(etag)
    modified, sent = (email.utils.parsedate_tz(headers.get(name, "")) for name in ("Last-Modified", "Date"))
    if modified is None or sent is None:
        return None
    age_s = email.utils.mktime_tz(sent) - email.utils.mktime_tz(modified)
    return str(headers["Last-Modified"]) if age_s >= DATE_IS_STRONG_AFTER_S else None
