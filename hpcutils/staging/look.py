"""What a node's cache has of a dataset, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpcutils.staging import cache, store
from hpcutils.staging.dataset import Dataset
from hpcutils.staging.load import prove
from hpcutils.staging.plan import Facts, Kept, StagePlan, State, plan_stage
from hpcutils.staging.proof import remark, trouble
from hpcutils.staging.store import FILES, Place


def place_of(dataset: Dataset, root: Path) -> Place:
    """Return where a dataset is kept."""
    return Place(root, dataset.kind, dataset.key)


@dataclass(frozen=True)
class Looked:
    """What a node's cache has of a dataset.

    Args:
        facts: For the plan.
        partial: The folder that is to be filled; `None` when nothing is, or nothing may be touched.
        finished: Digests of the segments that are there, by number.
        wrong: Inode of a dataset that is not what it was, and keeps its name until this one takes it: a running job uses it.
    """

    facts: Facts
    partial: Path | None
    finished: dict[int, str]
    wrong: int | None = None


def look(dataset: Dataset, place: Place, *, verify: bool = False, take: bool = False) -> Looked:
    """Find out what is there. With `take` a partial is claimed, or made, for this process; without, nothing is touched.

    A complete dataset that is not what it was is taken out of its name with `take`, and what is right of it is kept; but not under
    the hands of a running job: then another one is made beside it.
    """
    state: State = "missing"
    folder: Path | None = None
    wrong: int | None = None
    if place.entry.is_dir():
        if is_sound(place, verify) or (take and remark(place, dataset.name)):
            if take:
                store.drop_partials(place)
            finished = store.read_finished(place.entry, dataset.segment_bytes)
            facts = facts_of_node("present", frozenset(finished), dataset.size_bytes, place)
            return Looked(facts, None, finished)
        state, wrong = "corrupt", store.inode_of(place.entry)
        folder = place.entry if not take else None if cache.is_used_by_others(place) else store.put_aside(place)
        if take and folder is not None:
            store.drop_partials(place)
    if folder is None:
        left = place.partials()
        state = "partial" if left else state
        folder = store.claim(place) if take else (left[0] if left else None)
    if folder is not None and take:
        store.prune(folder, (entry.path for entry in dataset.entries()))
    finished = {} if folder is None else _proved(dataset, folder, store.read_finished(folder, dataset.segment_bytes))
    if folder is not None and take:
        store.write_finished(folder, dataset.segment_bytes, finished)
    have_bytes = sum(segment.size_bytes for segment in dataset.segments() if segment.number in finished) if finished else 0
    if state == "partial" and not finished:
        state = "missing"
    facts = facts_of_node(state, frozenset(finished), have_bytes, place)
    return Looked(facts, folder if take else None, finished, wrong)


def is_sound(place: Place, verify: bool) -> bool:
    """Say whether a dataset that has its name is what it was; `verify` hashes it."""
    return not trouble(place) if verify else store.is_intact(place.entry)


def facts_of_node(state: State, have: frozenset[int], have_bytes: int, place: Place) -> Facts:
    """Return what a plan reckons with: what is there of a dataset, the disk, and what else is in the cache."""
    free_bytes, block_bytes, free_files = cache.disk_of(place.root)
    return Facts(state, have, have_bytes, free_bytes, _others(place), block_bytes, free_files)


def _others(place: Place) -> tuple[Kept, ...]:
    there = cache.kept_in(place.root) + cache.begun_in(place.root)
    return tuple(kept for kept in there if (kept.kind, kept.key) != (place.kind, place.key))


def _proved(dataset: Dataset, folder: Path, finished: dict[int, str]) -> dict[int, str]:
    listed = (segment for segment in dataset.segments() if segment.number in finished) if finished else iter(())
    return prove(folder / FILES, listed, finished)


def plan_dataset(dataset: Dataset, place: Place, looked: Looked, quota_bytes: int | None = None, rate: float = 0.0) -> StagePlan:
    """Return what this node has to do."""
    return plan_stage(
        dataset.name, place.entry, dataset.files, dataset.size_bytes, dataset.segment_count, looked.facts, quota_bytes, rate
    )
