"""Data on the nodes' own disks: read once from where it is kept, proved on every node, found there by the next job.

look (each node) ─► plan (pure) ─► rounds (pure) ─► load ─► ring ─► land ─► complete: a rename
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from hpcutils import fs
from hpcutils.errors import DataError, HpcutilsError, IntegrityError
from hpcutils.log import LOGGER
from hpcutils.staging import cache, store
from hpcutils.staging.dataset import Dataset, dataset_of_file, dataset_of_manifest
from hpcutils.staging.download import fetch
from hpcutils.staging.items import Item, Outcome, Settings, Staged, summary
from hpcutils.staging.leaders import Leaders
from hpcutils.staging.look import Looked, look, place_of, plan_dataset
from hpcutils.staging.manifest import read_manifest
from hpcutils.staging.move import Move, disk_errors
from hpcutils.staging.origins import Origin, WebOrigin, origin_of
from hpcutils.staging.overlay import Arriving
from hpcutils.staging.plan import StagePlan
from hpcutils.staging.private import open_root
from hpcutils.staging.proof import trouble
from hpcutils.staging.ring import plan_rounds
from hpcutils.staging.store import Head, Place


@dataclass(frozen=True)
class Reading:
    """How a dataset is had from its source: arguments of `begin_dataset`."""

    base: str
    settings: Settings
    single: bool
    whole: bool
    mark: str | None
    again: bool


class Coming:
    """A dataset that all leaders have looked for and planned: what is left is to move it, unless it is everywhere already.

    Args:
        dataset: What.
        place: Where to.
        leaders: One rank of each node; nothing else talks over their communicator until `finish` returns.
        started_s: When it began (`time.monotonic`).
        move: What is left to do, or
        outcome: what came of it.
        source: What its files are read from, where there is a `move`.
    """

    def __init__(
        self,
        dataset: Dataset,
        place: Place,
        leaders: Leaders,
        started_s: float,
        move: Move | None = None,
        outcome: Outcome | None = None,
        source: Reading | None = None,
    ) -> None:
        self.dataset, self.place, self.outcome = dataset, place, outcome
        self._leaders, self._started_s, self._move, self._source = leaders, started_s, move, source

    @property
    def move_bytes(self) -> int:
        """Bytes that this node's disk has to take yet."""
        if self._move is None or self._move.partial is None:
            return 0
        return self.dataset.size_bytes - self._move.looked.facts.have_bytes

    def arriving(self, path: str) -> Arriving | None:
        """Return how a file can be read before `finish`; `None` where it is here already."""
        source = self._source
        if self._move is None or self._move.partial is None or source is None:
            return None
        begin_bytes = 0
        for entry in self.dataset.entries():
            if entry.path == path:
                where = self._move.partial, self.place.entry, source.base, source.single
                return Arriving(path, entry.size_bytes, begin_bytes, self.dataset.segment_bytes, *where)
            begin_bytes += entry.size_bytes
        raise AssertionError(path)

    def finish(self) -> Outcome:
        """Move; each leader calls it.

        Raises:
            DataError: The source cannot be read, or a disk cannot be written. On every leader.
            IntegrityError: The source is not what it must be, or a node got damaged bytes again and again. On every leader.
        """
        if self.outcome is not None or self._move is None:
            assert self.outcome is not None
            return self.outcome
        try:
            digest = self._move.run(self._started_s)
        except HpcutilsError:
            self.give_up()
            raise
        dataset, leaders = self.dataset, self._leaders
        totals = [sum(column) for column in zip(*leaders.gather(self._move.counts()), strict=True)]
        seconds = time.monotonic() - self._started_s
        self.outcome = Outcome(
            self.place.files, digest, dataset.size_bytes, totals[0], totals[1], seconds, leaders.size, totals[2]
        )  # fmt: skip
        rotten = [rank for rank, found in enumerate(leaders.gather(self._move.rotten)) if found]
        if rotten:
            self.outcome = self._mend(self.outcome, rotten)
        elif leaders.rank == 0:
            LOGGER.info("%s", summary(dataset.name, self.outcome))
        return self.outcome

    def _mend(self, first: Outcome, rotten: list[int]) -> Outcome:
        """Stage once more: the nodes of the leaders `rotten` hash all that they have, and get what is wrong of it."""
        source, name = self._source, self.dataset.name
        assert source is not None
        if not source.again:
            raise IntegrityError(
                f"{name} on the node of leader {rotten[0]} changes again and again",
                "its disk or memory is at fault: leave it out",
            )
        LOGGER.warning("%s: %d nodes had a damaged copy under its name; it is mended", name, len(rotten))
        settings = replace(source.settings, verify=source.settings.verify or self._leaders.rank in rotten)
        words = {"single": source.single, "whole": source.whole, "mark": source.mark, "again": False}
        more = begin_dataset(self.dataset, source.base, settings, self._leaders, **words).finish()  # type: ignore[arg-type]
        sums = {key: getattr(first, key) + getattr(more, key) for key in ("origin_bytes", "received_bytes", "seconds", "repeats")}
        return replace(more, **sums)

    def give_up(self) -> None:
        """Leave it; what has landed stays for the next job."""
        store.give_up(self.place)
        cache.unpin(self.place)


def begin_dataset(
    dataset: Dataset,
    base: str,
    settings: Settings,
    leaders: Leaders,
    *,
    single: bool = False,
    whole: bool = False,
    origin: Origin | None = None,
    mark: str | None = None,
    again: bool = True,
) -> Coming:
    """Look for `dataset` on every node, and plan how each gets it; each leader calls it with the same arguments.

    Args:
        dataset: What.
        base: Its source: a folder or the URL of one; with `single` the file itself.
        settings: Where to, and how.
        leaders: One rank of each node.
        single: See `base`.
        whole: The first leader reads it all.
        origin: What `base` was opened as already.
        mark: What its file was known by before it was read, where no digest tells whether it changed meanwhile.
        again: A node whose complete copy turns out to be rotten while it gives of it may be mended, once.

    Raises:
        DataError: A node has no room. On every leader.
    """
    started_s = time.monotonic()
    place = place_of(dataset, settings.root)
    try:
        looked, _ = leaders.together(lambda: _prepare(dataset, place, settings))
        haves = leaders.gather(None if looked.facts.state == "present" else looked.facts.have)
        if all(have is None for have in haves):
            return _already(dataset, place, started_s, leaders)
        origin = origin or origin_of(base, bounded=leaders.size > 1, single=single)
        divisible = not whole and _is_divisible(origin, dataset, leaders)
        rounds = plan_rounds(dataset.segment_count, haves, divisible=divisible)
        move = Move(dataset, place, looked, origin, leaders, rounds, mark)
    except HpcutilsError:
        store.give_up(place)
        cache.unpin(place)
        raise
    source = Reading(base, settings, single, whole, mark, again)
    return Coming(dataset, place, leaders, started_s, move, source=source)


def _already(dataset: Dataset, place: Place, started_s: float, leaders: Leaders) -> Coming:
    # Together: a leader that does not find it any more must not leave the others waiting.
    head = leaders.together(lambda: _head(place))
    LOGGER.info("%s: on %s already", head.name, "this node" if leaders.size == 1 else f"all {leaders.size} nodes")
    outcome = Outcome(place.files, head.digest, head.size_bytes, 0, 0, time.monotonic() - started_s, leaders.size, 0)
    return Coming(dataset, place, leaders, started_s, outcome=outcome)


def _head(place: Place) -> Head:
    head = store.read_head(place.entry)
    if head is None:
        raise DataError(f"{place.entry} was removed while the job started", "submit it again")
    return head


def _prepare(dataset: Dataset, place: Place, settings: Settings) -> tuple[Looked, StagePlan]:
    """Pin, look, plan, and make room: all that a node does before bytes move."""
    with disk_errors(place):
        open_root(place.root)
        cache.pin(place)
        try:
            cache.sweep(place.root)
            looked = look(dataset, place, verify=settings.verify, take=True)
            plan = plan_dataset(dataset, place, _less(looked, settings), _left(settings))
            plan.require_room()
        except BaseException:
            store.give_up(place)
            raise
        cache.make_room(place.root, plan.evict)
        if looked.facts.state == "present":
            cache.touch(place)
        return looked, plan


def _less(looked: Looked, settings: Settings) -> Looked:
    """Return what was found, without the room that is promised to others."""
    facts = looked.facts
    return replace(looked, facts=replace(facts, free_bytes=facts.free_bytes - settings.promised_bytes))


def _left(settings: Settings) -> int | None:
    return None if settings.quota_bytes is None else settings.quota_bytes - settings.promised_bytes


def _is_divisible(origin: Origin, dataset: Dataset, leaders: Leaders) -> bool:
    """Say whether each leader can read its part: a web server may know no ranges."""
    entry = dataset.entry
    if leaders.size == 1 or not isinstance(origin, WebOrigin) or entry is None:
        return True
    return leaders.gather(leaders.together(lambda: leaders.rank > 0 or origin.knows_ranges(entry.path, entry.size_bytes)))[0]


def begin_manifest(path: Path, source: str | None, settings: Settings, leaders: Leaders) -> Coming:
    """Look for the files of a manifest on every node, and plan.

    Args:
        path: The manifest.
        source: The folder, or the URL of one, that its paths start from; `None` is the folder it is in.
        settings: Where to, and how.
        leaders: One rank of each node.
    """
    dataset = leaders.together(lambda: dataset_of_manifest(read_manifest(path)))
    keys = leaders.gather(dataset.key)
    if len(set(keys)) > 1:
        raise DataError(f"the nodes see different bytes of {path}", "it changed while the job started: submit it again")
    return begin_dataset(dataset, source or str(path.parent), settings, leaders)


def stage_manifest(path: Path, source: str | None, settings: Settings, leaders: Leaders) -> Outcome:
    """Have the files of a manifest on every node; see `begin_manifest`."""
    return begin_manifest(path, source, settings, leaders).finish()


def begin_item(item: Item, settings: Settings, leaders: Leaders) -> Coming:
    """Look for one file on every node, and plan. A file with a digest that all nodes have is not asked for at its source.

    A file whose length its server does not tell is moved at once.
    """
    started_s = time.monotonic()
    if item.sha256 is not None:
        dataset = dataset_of_file(item.name, 0, item.sha256)
        place = place_of(dataset, settings.root)
        if None not in leaders.gather(leaders.together(lambda: _warm(place, settings.verify))):
            return _already(dataset, place, started_s, leaders)
    origin = origin_of(item.origin, bounded=leaders.size > 1, single=True)
    try:
        mark = leaders.together(lambda: origin.mark(item.name)) if item.sha256 is None else None
        facts = leaders.together(lambda: facts_of(item, origin) if leaders.rank == 0 else (0, ""))
        size_bytes, identity = leaders.gather(facts)[0]
        if size_bytes is None:
            origin.close()
            return _download_first(item, settings, leaders)
        dataset = dataset_of_file(item.name, size_bytes, item.sha256, identity, leaders.size)
        coming = begin_dataset(dataset, item.origin, settings, leaders, single=True, origin=origin, mark=mark)
    except HpcutilsError:
        origin.close()
        raise
    if coming.outcome is not None:
        origin.close()
    return coming


def stage_item(item: Item, settings: Settings, leaders: Leaders) -> Outcome:
    """Have one file on every node; see `begin_item`."""
    return begin_item(item, settings, leaders).finish()


def _download_first(item: Item, settings: Settings, leaders: Leaders) -> Coming:
    """Have a file whose server does not say how long it is: the first leader fetches it, and all go on from there."""
    # Trash from the beginning: when this process is killed, the next one sweeps it.
    folder = Place(settings.root, "stat", "download").temporary(store.TRASH)

    def get() -> int:
        if leaders.rank > 0:
            return 0
        open_root(settings.root)
        return fetch(item.origin, folder / item.name, digest=item.sha256).bytes_moved

    try:
        size_bytes = leaders.gather(leaders.together(get))[0]
        dataset = dataset_of_file(item.name, size_bytes, item.sha256, item.origin, leaders.size)
        coming = begin_dataset(dataset, str(folder / item.name), settings, leaders, single=True, whole=True)
        coming.finish()
        return coming
    finally:
        fs.remove(folder)


def _warm(place: Place, verify: bool) -> Head | None:
    """Pin a dataset, and return its head if it is complete."""
    if not place.entry.is_dir():
        return None
    with disk_errors(place):
        cache.pin(place)
        cache.sweep_pins(place.root)
    if not store.is_intact(place.entry) or (verify and trouble(place)):
        return None
    with disk_errors(place):
        store.drop_partials(place)
    cache.touch(place)
    return store.read_head(place.entry)


def facts_of(item: Item, origin: Origin) -> tuple[int | None, str]:
    """Return a file's length (`None` where the server does not say), and what it is known by where no digest says more."""
    size_bytes = origin.size_bytes(item.name)
    changed = "0" if item.sha256 is not None else _version(item, origin)
    return size_bytes, f"{item.origin}\0{size_bytes}\0{changed}"


def _version(item: Item, origin: Origin) -> str:
    return str(Path(item.origin).stat().st_mtime_ns) if item.origin.startswith("/") else origin.mark(item.name)


def stage(item: Item, root: Path) -> Staged:
    """Have `item` on this node alone."""
    outcome = stage_item(item, Settings(root), Leaders())
    return Staged(outcome.files / item.name, outcome.digest, outcome.origin_bytes)
