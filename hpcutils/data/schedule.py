"""Which window of the order is decoded into which part of memory, and when that part is free: arithmetic only.

The windows of a node are decoded in the order in which they are first needed, epoch after epoch. There are `slots` places for
them; a window takes the place of the one that ends first. Every rank works out the same schedule by itself.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from hpcutils.data.layout import Layout
from hpcutils.data.order import Order
from hpcutils.data.shards import EpochOrder, window_chunks


@dataclass(frozen=True)
class MemoryPlan:
    """How much of a node's memory the windows take.

    Args:
        slots: Windows that have a place at one time.
        slot_rows: Samples of the largest window.
        live: Windows of one shard that have a place at one time, at most.
    """

    slots: int
    slot_rows: int
    live: int


@dataclass(frozen=True)
class Task:
    """One window to decode. Steps are counted on from epoch to epoch.

    Args:
        number: Counted from 0 since the schedule began.
        epoch: The epoch that needs it.
        shard: Its shard.
        window: Its number among its shard's.
        slot: Where to.
        after: Steps that every rank of the node must have read before the slot is free.
        before: The first step that may need it.
    """

    number: int
    epoch: int
    shard: int
    window: int
    slot: int
    after: int
    before: int


def plan_memory(order: Order) -> MemoryPlan:
    """Return the memory that no schedule of this order can get stuck with.

    A step needs all windows that it touches at once. Where a window begins and ends is known to within S positions (S shards), so a
    shard has at most `live` windows between the start of a step, less S, and its end, plus S; one slot for each of them, and the
    window that is decoded next always finds a place that was given up before the step that needs it. Broken chunks make windows
    smaller: b of them among one shard's, of f chunks each or more, let b / f more windows lie between, rounded up.
    """
    layout, shards = order.layout, order.shards
    most_chunks = window_chunks(layout, shards)
    each, longer = divmod(layout.chunks, shards)
    shard_chunks = [each, each + 1] if longer else [each]
    fewest = min(chunks // -(-chunks // most_chunks) for chunks in shard_chunks)
    shard_rows = min(shard_chunks[-1] * layout.chunk_rows, layout.samples)
    touched = shard_rows * (order.batch_size + 2 * shards + 4) // layout.samples + 2
    # Two windows may reach into the steps from outside; those between them are whole, but for the ones of broken chunks.
    live = 2 + max(0, touched - 2) // (fewest * layout.chunk_rows)
    broken, owned = len(layout.broken), shards // order.seat.nodes
    # One broken chunk in each shard costs a window there; only `fewest` more in the same shard cost another.
    slots = owned * live + min(broken, owned) + max(0, broken - owned) // fewest
    return MemoryPlan(slots, min(most_chunks * layout.chunk_rows, layout.samples), live + -(-broken // fewest))


@lru_cache(4)
def epoch_order(layout: Layout, seed: int, epoch: int, shuffle: bool) -> EpochOrder:
    """Return the order of an epoch, kept for the threads that ask for the same one."""
    return EpochOrder(layout, seed, epoch, shuffle)


def schedule(order: Order, slots: int, first_epoch: int, first_step: int, epochs: int | None = None) -> Iterator[Task]:
    """Yield the windows of this node, from a step of an epoch on.

    Args:
        order: Of any rank of the node.
        slots: From `plan_memory`.
        first_epoch: Where to begin.
        first_step: Windows that end before this step of the first epoch are left out.
        epochs: The number of all epochs; `None` goes on for ever.
    """
    # The last step that may need what is in a slot.
    held = [(-1, slot) for slot in range(slots)]
    number = 0
    for epoch in itertools.count(first_epoch) if epochs is None else range(first_epoch, epochs):
        base = epoch * order.steps
        for first, last, shard, window in _windows(order, epoch, first_step if epoch == first_epoch else 0):
            ended, slot = heapq.heappop(held)
            yield Task(number, epoch, shard, window, slot, ended + 1, base + first)
            heapq.heappush(held, (base + last, slot))
            number += 1


def _windows(order: Order, epoch: int, first_step: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first step, last step, shard, window) of this node's windows, in the order of their first samples.

    Those that end before `first_step` are left out, each shard's by bisection: a place late in an epoch costs as much as its start.
    """
    sequence = epoch_order(order.layout, order.seed, epoch, order.shuffle)
    # (time of the first sample, shard, window): a shard's next window, for each shard.
    queue = []
    for shard in range(order.seat.node, sequence.shards, order.seat.nodes):
        number = _window_of(order, sequence, shard, first_step)
        if number < sequence.window_count(shard):
            queue.append((_times_of(sequence, shard, number)[0], shard, number))
    heapq.heapify(queue)
    while queue:
        _, shard, number = heapq.heappop(queue)
        yield *_steps_of(order, sequence, shard, number), shard, number
        if number + 1 < sequence.window_count(shard):
            heapq.heappush(queue, (_times_of(sequence, shard, number)[1], shard, number + 1))


def _window_of(order: Order, sequence: EpochOrder, shard: int, step: int) -> int:
    """Return the first window of a shard that a step or a later one may need."""
    windows = range(sequence.window_count(shard))
    return bisect.bisect_left(windows, step, key=lambda number: _steps_of(order, sequence, shard, number)[1])


def _times_of(sequence: EpochOrder, shard: int, window: int) -> tuple[float, float]:
    """Return the times at which a window begins and ends."""
    first, rows = sequence.span(shard, window)
    size = int(sequence.sizes[shard])
    return first / size, (first + rows) / size


def _steps_of(order: Order, sequence: EpochOrder, shard: int, window: int) -> tuple[int, int]:
    """Return the first and the last step that may need a window.

    A time t lies at position N t, give or take the number of shards.
    """
    begin, end = _times_of(sequence, shard, window)
    slack = sequence.shards + 1
    first = max(0, int(begin * order.samples) - slack) // order.batch_size
    last = (int(end * order.samples) + slack) // order.batch_size
    return first, min(last, order.steps - 1)
