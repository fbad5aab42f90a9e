"""What is asked of staging, and what came of it: values that others plan and record with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpcutils.staging.plan import shown_bytes


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


@dataclass(frozen=True)
class Settings:
    """How a job wants its data staged.

    Args:
        root: The cache on each node.
        quota_bytes: What it may hold; `None` leaves it to the disk.
        verify: Hash again what is there already.
        promised_bytes: Of that and of the disk, what datasets that are still being moved will take.
    """

    root: Path
    quota_bytes: int | None = None
    verify: bool = False
    promised_bytes: int = 0


@dataclass(frozen=True)
class Outcome:
    """What staging a dataset took; the figures of bytes count all nodes.

    Args:
        files: The folder of its files on this node.
        digest: sha256 of the manifest, or of the one file.
        size_bytes: Bytes of the dataset.
        origin_bytes: Bytes that were read from its source.
        received_bytes: Bytes that nodes got from each other.
        seconds: How long it took.
        nodes: Number of nodes.
        repeats: Segments that came damaged over the network and were sent again.
    """

    files: Path
    digest: str
    size_bytes: int
    origin_bytes: int
    received_bytes: int
    seconds: float
    nodes: int
    repeats: int

    def record(self) -> dict[str, float | int | str]:
        """Return what the run's record keeps."""
        names = ("digest", "size_bytes", "origin_bytes", "received_bytes", "nodes", "repeats")
        return {name: getattr(self, name) for name in names} | {"seconds": round(self.seconds, 3)}


def summary(name: str, outcome: Outcome) -> str:
    """Return the line that ends a log of staging."""
    share = outcome.origin_bytes / outcome.size_bytes if outcome.size_bytes else 0.0
    return (
        f"{name}: {shown_bytes(outcome.size_bytes)} on {outcome.nodes} of {outcome.nodes} nodes in {outcome.seconds:.1f} s "
        f"({shown_bytes(outcome.size_bytes / max(outcome.seconds, 1e-6))}/s a node), read {share:.2f} times from the source"
    )
