"""Is an image what it says? Its digest, its signature, and what the site says of it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from hpcutils.errors import ImageError
from hpcutils.hashing import digest_file
from hpcutils.image.find import Image, find_builder
from hpcutils.image.layers import plain_environment
from hpcutils.log import LOGGER
from hpcutils.shell import run
from hpcutils.specs.site import PublishedImage

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


def verify(image: Image, published: PublishedImage | None = None, alias: str = "") -> Verdict:
    """Hold an image against what is known of it: the site's word, else its own sidecar's.

    Raises:
        ImageError: It was withdrawn, it is not the file that was built or published, or its signature does not hold.
    """
    if published is not None:
        check_status(alias, published)
    expected = image.sha256 if published is None else published.sha256
    found = digest_file(image.path)
    if expected and found != expected:
        whose = f"published as {alias!r}" if published is not None else f"built as {image.name!r}"
        raise ImageError(
            f"{image.path} is not the file that was {whose}: its sha256 is {found}, {expected} was expected",
            "tell whoever keeps the site's images" if published is not None else f"build it again: hpcutils build {image.name}",
        )
    if published is not None and published.key is not None:
        check_signature(image.path, Path(published.key))
    return Verdict(image.path, found, published is not None and published.key is not None, published.status if published else "")


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
