"""What an archive holds, as a dataset of its own in the cache."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from hpcutils import fs
from hpcutils.errors import DataError
from hpcutils.staging import cache, members, store
from hpcutils.staging.archive import unpack
from hpcutils.staging.find import Found
from hpcutils.staging.items import Settings
from hpcutils.staging.leaders import Leaders
from hpcutils.staging.look import facts_of_node, is_sound
from hpcutils.staging.manifest import write_manifest
from hpcutils.staging.members import Limits
from hpcutils.staging.move import disk_errors
from hpcutils.staging.plan import RESERVE_BYTES, StagePlan, plan_stage
from hpcutils.staging.proof import remark
from hpcutils.staging.store import FILES, LIST, Head, Place

FORMATS = ("tar", "zip")


def unpack_archive(packed: Path, digest: str, member: str, settings: Settings, leaders: Leaders) -> Path:
    """Unpack a staged archive on every node, unless that was done before; return the path of a member.

    Args:
        packed: The archive on this node.
        digest: Its sha256.
        member: The path in it of the file that is wanted.
        settings: Where the cache is.
        leaders: One rank of each node.

    Raises:
        ArchiveError: It is no archive, is damaged, or holds a member that is refused; see `get_file`.
        DataError: It has no such member, or the disk refuses. On every leader.
    """
    place = Place(settings.root, "unpacked", digest)
    return leaders.together(lambda: _member(packed, place, member, settings))


def _member(packed: Path, place: Place, member: str, settings: Settings) -> Path:
    with disk_errors(place):
        cache.pin(place)
        cache.sweep_pins(place.root)
        if not (place.entry.is_dir() and (is_sound(place, settings.verify) or remark(place, packed.name))):
            _unpack(packed, place, settings.quota_bytes)
        cache.touch(place)
    path = place.files / member
    if not path.is_file():
        near = ", ".join(sorted(str(each.relative_to(place.files)) for each in place.files.rglob(f"*{path.suffix}"))[:5])
        raise DataError(f"{packed.name} has no member {member!r}", f"it has, among others: {near or 'none of that kind'}")
    return path


def _unpack(packed: Path, place: Place, quota_bytes: int | None) -> None:
    """Unpack into a partial, list what came out, and give it its name."""
    started_s = time.monotonic()
    store.drop_partials(place)
    # What a running job uses keeps its name until this one takes it.
    wrong = store.inode_of(place.entry)
    if not cache.is_used_by_others(place):
        store.discard(place.entry, place)
    limits = _make_room(packed, place, quota_bytes)
    partial = store.new_partial(place)
    try:
        names = unpack(packed, partial / FILES, FORMATS, limits, packed.name)
        files = (Found(name, partial / FILES / name) for name in names if not (partial / FILES / name).is_symlink())
        made = write_manifest(files, partial / LIST)
        size_bytes, seconds = made.total.size_bytes, round(time.monotonic() - started_s, 3)
        _evict(_plan(packed, place, quota_bytes, size_bytes, have_bytes=size_bytes), place)
        head = Head(packed.name, len(names), size_bytes, made.digest(), size_bytes, seconds)
        store.complete(partial, place, head, wrong)
    except BaseException:
        fs.remove(partial)
        raise


def _make_room(packed: Path, place: Place, quota_bytes: int | None) -> Limits:
    """Evict what has to go; returns how much may be written.

    Raises:
        DataError: There is no room, as far as that is known before.
    """
    expected_bytes, is_known = members.expected_bytes(packed)
    plan = _plan(packed, place, quota_bytes, expected_bytes)
    if is_known:
        _evict(plan, place)
    else:
        cache.make_room(place.root, plan.evict)
    return replace(Limits.of(packed), free_bytes=max(0, cache.free_bytes(place.root) - RESERVE_BYTES))


def _evict(plan: StagePlan, place: Place) -> None:
    plan.require_room()
    cache.make_room(place.root, plan.evict)


def _plan(packed: Path, place: Place, quota_bytes: int | None, size_bytes: int, have_bytes: int = 0) -> StagePlan:
    facts = facts_of_node("partial", frozenset(), have_bytes, place)
    return plan_stage(f"{packed.name}, unpacked", place.entry, 1, size_bytes, 1, facts, quota_bytes)
