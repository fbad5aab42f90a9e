"""Is an image what it says? Its digest, its signature, and what the site says of it.

Reading an image takes seconds, and a job is submitted in a fraction of one. So what was found is remembered for the very file:
number, size, and the times of its last change, which no program can set back (`ctime`). Any write to it makes it unknown again.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcutils.errors import ImageError
from hpcutils.fs import write_text
from hpcutils.hashing import digest_file
from hpcutils.image.caller import plain_environment
from hpcutils.image.find import Image, cache_folder, find_builder
from hpcutils.log import LOGGER
from hpcutils.shell import run
from hpcutils.specs.site import PublishedImage, Site

SIGNATURE_S = 120.0


@dataclass(frozen=True)
class Verdict:
    """What is known of an image after a look at it.

    Args:
        path: The file.
        sha256: Its digest.
        signed: Whether a signature was asked for, and holds.
        status: What the site says of it; empty for one that no site has published.
    """

    path: Path
    sha256: str
    signed: bool
    status: str


def verify(
    image: Image, published: PublishedImage | None = None, alias: str = "", *, site: Site | None = None, fresh: bool = False
) -> Verdict:
    """Hold an image against what is known of it: the site's word, else its own sidecar's.

    Args:
        image: The image.
        published: What the site says of it.
        alias: The site's name for it, or what the user called it.
        site: The whole profile: a copy of a withdrawn image is as wrong as the image.
        fresh: Read the file though it was read before.

    Raises:
        ImageError: It was withdrawn, it is not the file that was built or published, or its signature does not hold.
    """
    if published is not None:
        check_status(alias, published)
    key = "" if published is None or published.key is None else published.key
    expected = image.sha256 if published is None else published.sha256
    known = None if fresh else remembered(image.path, key)
    before = identity(image.path)
    found = known or digest_file(image.path)
    if expected and found != expected:
        whose = f"published as {alias!r}" if published is not None else f"built as {image.name!r}"
        raise ImageError(
            f"{image.path} is not the file that was {whose}: its sha256 is {found}, {expected} was expected",
            "tell whoever keeps the site's images" if published is not None else f"build it again: hpcutils build {image.name}",
        )
    if published is None and site is not None:
        check_not_withdrawn(image.path, found, site)
    if known is None:
        if key:
            check_signature(image.path, Path(key))
        remember(image.path, key, found, before)
    return Verdict(image.path, found, bool(key), published.status if published else "")


def identity(path: Path) -> list[int]:
    """Return what tells this very file, as it is, from any other and from itself after a write."""
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def remembered(path: Path, key: str) -> str | None:
    """Return the digest that was found for this very file, its signature checked with this very key; `None` for a new one."""
    said = _memory().get(f"{path} {key}")
    try:
        same = said is not None and said["file"] == identity(path) and (not key or said["key"] == identity(Path(key)))
    except (KeyError, OSError, TypeError):
        return None
    return str(said["sha256"]) if said is not None and same else None


def remember(path: Path, key: str, sha256: str, before: list[int]) -> None:
    """Note what was found; `before` is the file's identity when it was read. A folder that cannot be written is no failure."""
    entry = {"file": before, "sha256": sha256, "key": identity(Path(key)) if key else []}
    with contextlib.suppress(OSError):
        write_text(_memory_file(), json.dumps({**_memory(), f"{path} {key}": entry}), mode=0o600)


def _memory_file() -> Path:
    return cache_folder() / "verified.json"


def _memory() -> dict[str, Any]:
    try:
        content = json.loads(_memory_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_status(alias: str, published: PublishedImage) -> None:
    """Refuse a withdrawn image, and warn of a deprecated one.

    Raises:
        ImageError: It was withdrawn.
    """
    said = f": {published.note}" if published.note else ""
    if published.status == "withdrawn":
        raise ImageError(f"the image {alias!r} was withdrawn{said}", "'hpcutils image list' shows the current ones")
    if published.status == "deprecated":
        LOGGER.warning(f"the image {alias!r} is deprecated{said}")


def check_not_withdrawn(path: Path, sha256: str, site: Site) -> None:
    """Refuse a file that the site knows by what is in it, and has withdrawn under every name.

    Raises:
        ImageError: It was withdrawn.
    """
    same = {alias: image for alias, image in site.images.items() if image.sha256 == sha256}
    if same and all(image.status == "withdrawn" for image in same.values()):
        alias, image = next(iter(same.items()))
        said = f": {image.note}" if image.note else ""
        raise ImageError(f"{path} is the withdrawn image {alias!r}{said}", "'hpcutils image list' shows the current ones")


def check_signature(image: Path, key: Path) -> None:
    """Check Apptainer's signature of a SIF against one public key and no other: not those that a user has gathered.

    Raises:
        ImageError: It is not signed with this key, or was changed since.
    """
    builder = find_builder()
    if not key.is_file():
        raise ImageError(f"{key}: no such file: the public key of the site's images", "tell whoever keeps the site's images")
    with tempfile.TemporaryDirectory(prefix="hpcutils-keys-") as folder:
        environment = plain_environment(APPTAINER_KEYSDIR=folder)
        run([builder, "key", "import", str(key)], env=environment, error=ImageError)
        done = run([builder, "verify", "--local", str(image)], env=environment, check=False, timeout_s=SIGNATURE_S)
    if done.returncode != 0:
        lines = [line.partition("FATAL:")[2].strip() or line for line in done.stderr.splitlines() if "FATAL" in line]
        reason = "; ".join(lines) or done.stderr.strip()
        raise ImageError(f"{image}: its signature does not hold against {key}: {reason}", "tell whoever keeps the site's images")
