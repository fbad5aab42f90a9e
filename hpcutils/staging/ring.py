"""Segments go round: each leader reads its own part of the source, and hands on what its left neighbour gave it.

A round moves one segment of each leader: after `size - 1` steps everybody has all of them. In each step a leader sends what it got
in the step before to the right, and receives another from the left, so that every link of the network is busy in both directions
and nobody sends more than once what all need. Every receiver proves a segment before it writes it or hands it on, and asks
its neighbour again when it is not right. A segment that cannot be had goes round as a word of regret: nobody waits for it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

from hpcutils.errors import IntegrityError
from hpcutils.log import LOGGER
from hpcutils.staging.leaders import Leaders, run, wait
from hpcutils.staging.load import Load, Pool, digest_of
from hpcutils.staging.segments import Segment

TRIES = 3
HEADER = struct.Struct("<B16s")
GIVEN, LOST = 1, 0
TAG_HEADER, TAG_DATA, TAG_VERDICT = 1, 2, 3
RIGHT, WRONG = b"\1", b"\0"
Round = tuple[int | None, ...]


def plan_rounds(count: int, haves: Sequence[frozenset[int] | None], *, divisible: bool = True) -> list[Round]:
    """Decide who reads what when: a list of rounds, in each a segment a leader, or `None`. Pure; the same on every leader.

    Args:
        count: Number of segments.
        haves: By leader, the segments that it has already; `None` is all of them. What everybody has is not moved; what
            somebody has is read from that node's disk.
        divisible: Whether the source can be read in parts; otherwise the first leader reads it all.
    """
    queues: list[list[int]] = [[] for _ in haves]
    readers = range(len(haves)) if divisible else range(1)
    for number in range(count):
        holders = [rank for rank, have in enumerate(haves) if have is None or number in have]
        if len(holders) < len(haves):
            owner = min(holders or readers, key=lambda rank: len(queues[rank]))
            queues[owner].append(number)
    return list(zip_longest(*queues))


class Ring:
    """The leaders in a circle.

    Args:
        leaders: Two or more.
        pool: Where buffers come from.

    Attributes:
        received_bytes: Bytes that came from the left.
        repeats: Segments that had to be asked for again.
    """

    def __init__(self, leaders: Leaders, pool: Pool) -> None:
        self._leaders, self._pool = leaders, pool
        self._left, self._right = (leaders.rank - 1) % leaders.size, (leaders.rank + 1) % leaders.size
        self.received_bytes = self.repeats = 0
        self.error: IntegrityError | None = None

    def turn(self, slots: Sequence[Segment | None], mine: Load | None) -> Iterator[Load]:
        """Go through one round; yields the others' segments as they are proved.

        Args:
            slots: The round's segments, by the leader that reads each.
            mine: This leader's own; `None` when it has none in this round, or could not read it.
        """
        rank, size = self._leaders.rank, self._leaders.size
        carried, held = mine, False
        for step in range(size - 1):
            out, due = slots[(rank - step) % size], slots[(rank - step - 1) % size]
            got: list[Load] = []
            run([*([self._give(out, carried)] if out is not None else []), *([self._take(due, got)] if due is not None else [])])
            if held and carried is not None:
                carried.buffer.drop()
            carried, held = (got[0] if got else None), True
            if carried is not None:
                yield carried
        if held and carried is not None:
            carried.buffer.drop()

    def outgoing(self, load: Load) -> memoryview:
        """Return the bytes that are sent; a test that plays a bad network changes them here."""
        return load.data

    def _give(self, segment: Segment, load: Load | None) -> Iterator[None]:
        """Hand a segment to the right, until it says that it is right."""
        comm = self._leaders.comm
        digest = bytes.fromhex(load.digest) if load is not None else bytes(16)
        header = bytearray(HEADER.pack(GIVEN if load is not None else LOST, digest))
        yield from wait(comm.Isend(header, self._right, TAG_HEADER))
        for _ in range(TRIES if load is not None else 0):
            assert load is not None
            verdict = bytearray(1)
            yield from wait(comm.Isend(self.outgoing(load), self._right, TAG_DATA), comm.Irecv(verdict, self._right, TAG_VERDICT))
            if verdict == RIGHT:
                return

    def _take(self, segment: Segment, got: list[Load]) -> Iterator[None]:
        """Receive a segment from the left, and put it into `got` if it proves right."""
        comm = self._leaders.comm
        header = bytearray(HEADER.size)
        yield from wait(comm.Irecv(header, self._left, TAG_HEADER))
        kind, digest = HEADER.unpack(header)
        if kind == LOST:
            return
        buffer = self._pool.take()
        data = buffer.memory[: segment.size_bytes]
        for attempt in range(1, TRIES + 1):
            yield from wait(comm.Irecv(data, self._left, TAG_DATA))
            self.received_bytes += len(data)
            found = digest_of(data)
            right = found == digest.hex() and segment.digest in (None, found)
            yield from wait(comm.Isend(bytearray(RIGHT if right else WRONG), self._left, TAG_VERDICT))
            if right:
                got.append(Load(segment, found, buffer))
                return
            self._note(segment, attempt)
        buffer.drop()

    def _note(self, segment: Segment, attempt: int) -> None:
        self.repeats += 1
        what = f"segment {segment.number} ({segment.pieces[0].path}) came damaged to {self._leaders.node}"
        LOGGER.warning("%s, time %d of %d", what, attempt, TRIES)
        if attempt == TRIES:
            hint = "the network or a node's memory is at fault; nothing was published"
            self.error = IntegrityError(f"{what} {TRIES} times from leader {self._left}", hint)


def slots_of(numbers: Round, found: dict[int, Segment], segments: Iterator[Segment]) -> list[Segment | None]:
    """Return a round's segments, taken from their stream; those that come before their turn wait in `found`."""
    slots: list[Segment | None] = []
    for number in numbers:
        while number is not None and number not in found:
            segment = next(segments)
            found[segment.number] = segment
        slots.append(None if number is None else found.pop(number))
    return slots


def rounds_of(
    rounds: Iterable[Round], segments: Iterator[Segment], wanted: frozenset[int] | None
) -> Iterator[list[Segment | None]]:
    """Yield the segments of each round. What no round wants (`wanted` says what one does; `None`: all) is not kept."""
    found: dict[int, Segment] = {}
    stream = segments if wanted is None else (segment for segment in segments if segment.number in wanted)
    for numbers in rounds:
        yield slots_of(numbers, found, stream)
