"""The plan: pure values in, a pure value out, and what a person reads of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from hpcutils.errors import DataError
from hpcutils.staging.plan import RESERVE_BYTES, RESERVE_FILES, Facts, Kept, describe, plan_stage

GIB = 1 << 30
OLD = Kept("manifest", "a" * 64, "old", 10, 3 * GIB, used_s=1.0, rate=100 * (1 << 20))
NEW = Kept("manifest", "b" * 64, "new", 10, 4 * GIB, used_s=2.0, rate=300 * (1 << 20))
PINNED = Kept("sha256", "c" * 64, "pinned", 1, 9 * GIB, used_s=0.0, pins=("node1-1-1-7-00000000",))


def plan(facts: Facts, **more):
    return plan_stage("set", Path("/cache/manifest/k"), 1000, 10 * GIB, 160, facts, **more)


def test_missing_is_moved_whole():
    made = plan(Facts("missing", free_bytes=100 * GIB))
    assert (made.move_bytes, made.evict, made.lacking_bytes, made.seconds) == (10 * GIB, (), 0, None)


def test_present_moves_nothing_and_needs_no_room():
    made = plan(Facts("present", frozenset(range(160)), 10 * GIB, 0, (OLD,)), quota_bytes=1)
    assert (made.move_bytes, made.evict, made.lacking_bytes, made.seconds) == (0, (), 0, 0.0)


@pytest.mark.parametrize("state", ["partial", "corrupt"])
def test_what_is_there_and_right_is_not_moved(state):
    made = plan(Facts(state, frozenset(range(40)), int(2.5 * GIB), 100 * GIB))
    assert made.move_bytes == int(7.5 * GIB)


def test_the_least_recently_used_go_first_and_no_more_than_must():
    free = 8 * GIB + RESERVE_BYTES
    assert plan(Facts("missing", free_bytes=free, kept=(NEW, OLD))).evict == (OLD,)
    assert plan(Facts("missing", free_bytes=free - 2 * GIB, kept=(NEW, OLD))).evict == (OLD, NEW)


def test_pinned_datasets_stay_whatever_it_costs():
    made = plan(Facts("missing", free_bytes=RESERVE_BYTES, kept=(PINNED, OLD)))
    assert (made.evict, made.lacking_bytes) == ((OLD,), 7 * GIB)
    with pytest.raises(DataError, match=r"no room for set: 10.0 GiB have to be moved .* 7.0 GiB are lacking after 1 datasets"):
        made.require_room()


def test_the_quota_counts_what_is_kept():
    facts = Facts("missing", free_bytes=1000 * GIB, kept=(OLD, NEW, PINNED))
    assert plan(facts, quota_bytes=26 * GIB).evict == ()
    assert plan(facts, quota_bytes=26 * GIB - 1).evict == (OLD,)
    assert plan(facts, quota_bytes=22 * GIB).evict == (OLD, NEW)
    assert plan(facts, quota_bytes=18 * GIB).lacking_bytes == GIB


def test_every_file_takes_blocks():
    facts = Facts("missing", free_bytes=10 * GIB + RESERVE_BYTES + 1000 * 4096, block_bytes=4096)
    assert plan(facts).lacking_bytes == 0
    assert plan(replace(facts, free_bytes=facts.free_bytes - 1)).lacking_bytes == 1
    # Of half the bytes, half the files.
    half = replace(facts, state="partial", have=frozenset({0}), have_bytes=5 * GIB, free_bytes=5 * GIB + RESERVE_BYTES + 500 * 4096)
    assert plan(half).lacking_bytes == 0


def test_small_files_that_go_give_back_their_blocks():
    small = Kept("manifest", "d" * 64, "small", 1 << 20, 1 << 20, used_s=0.0)
    free = 6 * GIB + RESERVE_BYTES + 1000 * 4096
    made = plan(Facts("missing", free_bytes=free, kept=(small, OLD, NEW), block_bytes=4096))
    assert (made.evict, made.lacking_bytes) == ((small,), 0)


def test_every_file_takes_an_inode():
    facts = Facts("missing", free_bytes=100 * GIB, free_files=1000 + RESERVE_FILES, kept=(OLD,))
    assert (plan(facts).lacking_files, plan(facts).evict) == (0, ())
    made = plan(replace(facts, free_files=facts.free_files - 11))
    assert (made.lacking_files, made.evict) == (1, (OLD,))
    with pytest.raises(DataError, match="the disk has room for 1 file less than it takes"):
        made.require_room()
    assert "1 file too many" in describe(made)


def test_time_is_reckoned_from_what_was_seen_here_or_said():
    facts = Facts("missing", free_bytes=100 * GIB, kept=(OLD, NEW))
    assert plan(facts).seconds == pytest.approx(10 * 1024 / 300)
    assert plan(facts, rate=10 * (1 << 20)).seconds == pytest.approx(1024)


def test_what_a_person_reads():
    made = plan(Facts("partial", frozenset(range(40)), int(2.5 * GIB), 8 * GIB, (OLD,)), quota_bytes=12 * GIB)
    assert describe(made, 12 * GIB).splitlines() == [
        "dataset   set: 1,000 files, 10.0 GiB, 160 segments",
        "cache     /cache/manifest/k",
        "state     partial: 40 of 160 segments are here and prove right; 7.5 GiB to move",
        "room      8.0 GiB free, quota 12.0 GiB: enough after old went",
        "estimate  1 min 17 s at 100.0 MiB/s",
    ]
    assert "unknown: nothing was staged here yet" in describe(plan(Facts("missing", free_bytes=100 * GIB)))
    assert "10.1 GiB are lacking" in describe(plan(Facts("missing", free_bytes=0)))
    assert "present: nothing to move" in describe(plan(Facts("present")))
