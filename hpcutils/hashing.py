"""Streaming digests with the algorithms that manifests and `get_file` use."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hpcutils.errors import SpecError

# Hexadecimal digits of each digest: what `hash_algorithm='auto'` decides by.
DIGEST_LENGTHS = {"md5": 32, "sha1": 40, "sha256": 64, "sha512": 128}
BLOCK_BYTES = 1 << 20


def algorithm_of(digest: str) -> str:
    """Return the algorithm that gives digests of this length.

    Raises:
        SpecError: No known algorithm gives one, or it is not hexadecimal.
    """
    found = next((name for name, length in DIGEST_LENGTHS.items() if length == len(digest)), None)
    if found is None or not set(digest.lower()) <= set("0123456789abcdef"):
        known = ", ".join(f"{name} {length}" for name, length in DIGEST_LENGTHS.items())
        raise SpecError(f"not a digest: {digest!r} ({len(digest)} characters)", f"hexadecimal digits expected: {known}")
    return found


def digest_file(path: Path, algorithm: str = "sha256") -> str:
    """Return the lower-case hexadecimal digest of a file, read once in constant memory."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()
