"""Data files on the node's own disk: copied once a node, checked while they move, found there by the next job.

The cache is content-addressed: `<root>/sha256/<digest>/<name>` beside a marker that is written last. A file without a known
digest is kept under its source's path, size and modification time.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hpcutils import fs
from hpcutils.errors import DataError, IntegrityError
from hpcutils.log import LOGGER
from hpcutils.staging.download import fetch

MARKER = ".complete.json"


@dataclass(frozen=True)
class Item:
    """One file to have on the node.

    Args:
        name: Its own name.
        origin: Absolute path or URL.
        sha256: What it must hash to, or `None`.
    """

    name: str
    origin: str
    sha256: str | None


@dataclass(frozen=True)
class Staged:
    """One file on the node's disk.

    Args:
        path: Where it is.
        sha256: What it hashed to when it was copied.
        moved_bytes: 0 when it was there already.
    """

    path: Path
    sha256: str
    moved_bytes: int


def cache_root() -> Path:
    """Return the node-local cache: `$HPCUTILS_NODE_CACHE`, or a folder of the user's in `$SLURM_TMPDIR`, `$TMPDIR` or `/tmp`."""
    named = os.environ.get("HPCUTILS_NODE_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()
    return Path(base) / f"hpcutils-{getpass.getuser()}" / "cache"


def plan_target(item: Item, root: Path) -> Path:
    """Return the path that `item` has, or will have, in the cache."""
    if item.sha256 is not None:
        return root / "sha256" / item.sha256 / item.name
    facts = Path(item.origin).stat()
    key = hashlib.sha256(f"{item.origin}\0{facts.st_size}\0{facts.st_mtime_ns}".encode()).hexdigest()
    return root / "stat" / key / item.name


def stage(item: Item, root: Path) -> Staged:
    """Have `item` on this node: take it from the cache, or copy and check it.

    Raises:
        DataError: The source is missing or cannot be read.
        IntegrityError: The source does not hash to what it must; nothing is left in the cache.
    """
    target = _target(item, root)
    known = _complete(target)
    if known is not None:
        LOGGER.info("%s: on this node already", item.name)
        return Staged(target, known, 0)
    target.parent.mkdir(parents=True, exist_ok=True)
    LOGGER.info("%s: staging to %s", item.name, target.parent)
    try:
        result = fetch(item.origin, target, digest=item.sha256, algorithm="sha256")
    except IntegrityError as exc:
        raise IntegrityError(f"{item.name}: {exc.message}", "correct 'sha256' in train.yaml, or restore the file") from exc
    facts = target.stat()
    marker = {"sha256": result.digest, "size_bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    fs.write_text(target.parent / MARKER, json.dumps(marker) + "\n")
    return Staged(target, result.digest, result.bytes_moved)


def _target(item: Item, root: Path) -> Path:
    try:
        return plan_target(item, root)
    except FileNotFoundError as exc:
        raise DataError(f"no such file: {item.origin}", "data must be on a file system that the nodes can see") from exc


def _complete(target: Path) -> str | None:
    """Return the digest of a complete file in the cache; size and time must be those that its marker names."""
    try:
        marker = json.loads((target.parent / MARKER).read_text())
        facts = target.stat()
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    same = (facts.st_size, facts.st_mtime_ns) == (marker["size_bytes"], marker["mtime_ns"])
    return str(marker["sha256"]) if same else None
