"""What has to be done so that a node has a dataset: a value that can be printed before anything is touched. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hpcutils.errors import DataError

State = Literal["present", "partial", "missing", "corrupt"]
# The disk is not filled to the last byte: directories, markers and other programs need some.
RESERVE_BYTES = 64 << 20
RESERVE_FILES = 64


# `left`: begun by a job that was killed; `growing`: begun by one that runs; `damaged`: its marker cannot be read.
Condition = Literal["complete", "damaged", "left", "growing"]


@dataclass(frozen=True)
class Kept:
    """Something that takes room in the cache.

    Args:
        kind: See `Dataset`.
        key: See `Dataset`.
        name: What it is called.
        files: Number of files.
        size_bytes: Bytes of all of them.
        used_s: When it was last used, in seconds since 1970.
        pins: Who uses it now.
        rate: Bytes a second with which it came; 0 where nobody knows.
        state: What it is.
    """

    kind: str
    key: str
    name: str
    files: int
    size_bytes: int
    used_s: float
    pins: tuple[str, ...] = ()
    rate: float = 0.0
    state: Condition = "complete"


@dataclass(frozen=True)
class Facts:
    """What a node's cache and disk are like.

    Args:
        state: `present` (complete, and every file as its marker says), `partial` (some segments, all proved), `corrupt`
            (complete once, and changed since) or `missing`.
        have: Segments that are there and prove right.
        have_bytes: Their bytes.
        free_bytes: Free on the disk.
        kept: What else takes room in the cache.
        block_bytes: What the smallest file takes on the disk.
        free_files: Files that the disk has room for; `None` where it does not say.
    """

    state: State
    have: frozenset[int] = frozenset()
    have_bytes: int = 0
    free_bytes: int = 0
    kept: tuple[Kept, ...] = ()
    block_bytes: int = 0
    free_files: int | None = None


@dataclass(frozen=True)
class StagePlan:
    """What one node will do.

    Args:
        name: The dataset.
        target: Its folder in the cache.
        state: See `Facts`.
        files: Number of files.
        size_bytes: Bytes of all of them.
        segments: Number of segments.
        have: Segments that need not be moved.
        move_bytes: Bytes that do.
        free_bytes: Free on the disk.
        evict: Datasets that make room, least recently used first.
        lacking_bytes: What is still missing then; 0 when there is room.
        rate: Bytes a second that were seen here before, or 0.
        lacking_files: Files that the disk has no room for, though it had room for their bytes.
    """

    name: str
    target: Path
    state: State
    files: int
    size_bytes: int
    segments: int
    have: frozenset[int] = field(repr=False)
    move_bytes: int
    free_bytes: int
    evict: tuple[Kept, ...]
    lacking_bytes: int
    rate: float
    lacking_files: int = 0

    @property
    def seconds(self) -> float | None:
        """How long it will take, where anything is known."""
        if self.move_bytes == 0:
            return 0.0
        return self.move_bytes / self.rate if self.rate else None

    def require_room(self) -> None:
        """Raise `DataError` unless there is room."""
        if self.lacking_bytes:
            raise DataError(
                f"no room for {self.name}: {shown_bytes(self.move_bytes)} have to be moved to {self.target.parent}, "
                f"and {shown_bytes(self.lacking_bytes)} are lacking after {len(self.evict)} datasets are evicted",
                "raise staging.quota_gb, name a larger disk (staging.cache), or wait for the jobs that pin the rest",
            )
        if self.lacking_files:
            less = "1 file" if self.lacking_files == 1 else f"{self.lacking_files:,} files"
            raise DataError(
                f"no room for {self.name}: {self.files:,} files go to {self.target.parent}, and the disk has room for {less} less "
                f"than it takes after {len(self.evict)} datasets are evicted (df -i)",
                "stage an archive or larger files, or name another disk (staging.cache)",
            )


def plan_stage(
    name: str,
    target: Path,
    files: int,
    size_bytes: int,
    segments: int,
    facts: Facts,
    quota_bytes: int | None = None,
    rate: float = 0.0,
) -> StagePlan:
    """Decide what one node does.

    Args:
        name: The dataset.
        target: Its folder in the cache.
        files: Number of files.
        size_bytes: Bytes of all of them.
        segments: Number of segments.
        facts: What the node is like.
        quota_bytes: What the cache may hold; `None` leaves it to the disk.
        rate: Bytes a second to reckon with; 0 takes what was seen here before.
    """
    move = 0 if facts.state == "present" else size_bytes - facts.have_bytes
    # As many of the files are there as of the bytes.
    makes = files * move // size_bytes if size_bytes else (0 if facts.state == "present" else files)
    evict, lacking, lacking_files = _make_room(facts, move, makes, size_bytes, quota_bytes)
    seen = sorted(kept.rate for kept in facts.kept if kept.rate)
    return StagePlan(
        name, target, facts.state, files, size_bytes, segments, facts.have, move, facts.free_bytes, evict, lacking,
        rate or (seen[len(seen) // 2] if seen else 0.0), lacking_files,
    )  # fmt: skip


def _make_room(facts: Facts, move: int, makes: int, size_bytes: int, quota_bytes: int | None) -> tuple[tuple[Kept, ...], int, int]:
    """Return what to evict, and the bytes and files that are lacking even so.

    First goes what is of no use, then the least recently used; what is pinned never. A file takes its bytes and at most a block
    more. The quota counts bytes alone: what a person asked for does not depend on the disk.
    """
    if facts.state == "present":
        return (), 0, 0
    disk = move + makes * facts.block_bytes + RESERVE_BYTES - facts.free_bytes if move or makes else 0
    quota = 0 if quota_bytes is None else size_bytes + sum(kept.size_bytes for kept in facts.kept) - quota_bytes
    inodes = 0 if facts.free_files is None else makes + RESERVE_FILES - facts.free_files
    evict = []
    for kept in sorted((kept for kept in facts.kept if not kept.pins), key=lambda kept: (kept.state == "complete", kept.used_s)):
        if max(disk, quota, inodes) <= 0:
            break
        evict.append(kept)
        disk -= max(kept.size_bytes, kept.files * facts.block_bytes)
        quota -= kept.size_bytes
        inodes -= kept.files
    return tuple(evict), max(0, disk, quota), max(0, inodes)


def shown_bytes(size: float) -> str:
    """Return `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def shown_seconds(seconds: float) -> str:
    """Return `1 h 20 min`, `3 min 5 s` or `4.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {round(seconds) % 60} s"


def describe(plan: StagePlan, quota_bytes: int | None = None) -> str:
    """Return the plan for a person."""
    files = "1 file" if plan.files == 1 else f"{plan.files:,} files"
    said = {
        "present": "present: nothing to move",
        "partial": f"partial: {len(plan.have):,} of {plan.segments:,} segments are here and prove right",
        "missing": "missing",
        "corrupt": f"corrupt: changed since it came; {len(plan.have):,} of {plan.segments:,} segments prove right",
    }[plan.state]
    if plan.move_bytes:
        said += f"; {shown_bytes(plan.move_bytes)} to move"
    room = f"{shown_bytes(plan.free_bytes)} free" + (f", quota {shown_bytes(quota_bytes)}" if quota_bytes is not None else "")
    if plan.lacking_bytes:
        room += f": {shown_bytes(plan.lacking_bytes)} are lacking"
    elif plan.lacking_files:
        room += f": {plan.lacking_files:,} file{'s' * (plan.lacking_files > 1)} too many"
    elif plan.evict:
        room += f": enough after {', '.join(kept.name for kept in plan.evict)} went"
    else:
        room += ": enough"
    time = "unknown: nothing was staged here yet; give --rate"
    if plan.seconds is not None:
        time = shown_seconds(plan.seconds) + (f" at {shown_bytes(plan.rate)}/s" if plan.move_bytes else "")
    head = f"dataset   {plan.name}: {files}, {shown_bytes(plan.size_bytes)}, {plan.segments:,} segments"
    return "\n".join([head, f"cache     {plan.target}", f"state     {said}", f"room      {room}", f"estimate  {time}"])
