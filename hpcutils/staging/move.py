"""One dataset on its way to the nodes that lack it: load ─► ring ─► land ─► complete."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

from hpcutils import fs
from hpcutils.errors import DataError, HpcutilsError, IntegrityError
from hpcutils.staging import store
from hpcutils.staging.dataset import Dataset
from hpcutils.staging.landing import Follower, Landing
from hpcutils.staging.leaders import Leaders
from hpcutils.staging.load import Load, Loader, Pool
from hpcutils.staging.look import Looked
from hpcutils.staging.origins import Origin
from hpcutils.staging.progress import Progress, Silent, progress_for
from hpcutils.staging.ring import Ring, Round, rounds_of
from hpcutils.staging.segments import Segment
from hpcutils.staging.store import FILES, LIST, Head, Place

# Segments that are read before their turn comes.
AHEAD = 2
# Besides those: one being sent, one being received, this leader's own, and some on their way to the disk.
BUFFERS = AHEAD + 6


@contextlib.contextmanager
def disk_errors(place: Place) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise DataError(
            f"cannot stage to {place.entry}: {exc.strerror or exc}",
            "check the space and the rights there, or set HPCUTILS_NODE_CACHE",
        ) from exc


class Move:
    """One dataset on its way to the nodes that lack it."""

    def __init__(
        self,
        dataset: Dataset,
        place: Place,
        looked: Looked,
        origin: Origin,
        leaders: Leaders,
        rounds: list[Round],
        mark: str | None = None,
    ) -> None:
        self.dataset, self.place, self.looked = dataset, place, looked
        self.origin, self.leaders, self.rounds, self.mark = origin, leaders, rounds, mark
        self.pool = Pool(BUFFERS, min(dataset.segment_bytes, max(dataset.size_bytes, 1)))
        self.ring = Ring(leaders, self.pool)
        self.origin_bytes = 0
        self.partial = looked.partial
        # The dataset that this node had complete, and gave to others, is not what it was.
        self.rotten = False

    def counts(self) -> tuple[int, int, int]:
        """Return bytes read from the origin, bytes received from neighbours, and segments asked for again."""
        return self.origin_bytes, self.ring.received_bytes, self.ring.repeats

    def run(self, started_s: float) -> str:
        """Move, and give the dataset its name on every node; returns its digest."""
        follower = self._follower()
        try:
            with contextlib.closing(self._progress()) as shows:
                self._go_round(follower, shows)
            self._confirm()
            return self.leaders.together(lambda: self._complete(follower, started_s))
        except HpcutilsError:
            if follower is not None:
                follower.stop()
            raise

    def _follower(self) -> Follower | None:
        if self.partial is None or self.dataset.entry is None:
            return None
        path = self.partial / FILES / self.dataset.entry.path
        return Follower(path, self.dataset.size_bytes, self.dataset.segment_bytes, frozenset(self.looked.finished))

    def _progress(self) -> Progress:
        if self.leaders.rank or self.dataset.size_bytes < 1 << 20:
            return Silent()
        nodes = f" to {self.leaders.size} nodes" if self.leaders.size > 1 else ""
        return progress_for(self.dataset.name, title=f"staging {self.dataset.name}{nodes}")

    def _go_round(self, follower: Follower | None, shows: Progress) -> None:
        here = self.place.files if self.partial is None else self.partial / FILES
        done_bytes = self.looked.facts.have_bytes
        begun = self.leaders.gather(done_bytes)
        shows.begin(min(begun))
        self._show(shows, begun)
        # Together: who cannot begin must not leave the others waiting in the first round.
        opened = self.leaders.together(lambda: self._open(follower))
        with Loader(self.origin, here, self.looked.finished, self.leaders.node) as loader, opened as landing:
            for slots, reading in self._read_ahead(loader):
                mine, error = _result(reading)
                for load in self._loads(slots, mine):
                    if landing is not None and load.segment.number not in self.looked.finished:
                        landing.land(load)
                        done_bytes += load.segment.size_bytes
                if mine is not None:
                    mine.buffer.drop()
                error = error or self.ring.error or (landing.error if landing is not None else None)
                self._show(shows, self.leaders.share(error, done_bytes))
            self.leaders.together(lambda: landing.wait() if landing is not None else None)
            self.origin_bytes = loader.origin_bytes
            self.rotten = self.partial is None and bool(loader.rotten)

    def _show(self, shows: Progress, done: list[int]) -> None:
        """Tell how far the last node is, and how many are done: one that had all is no measure."""
        size_bytes = self.dataset.size_bytes
        nodes = sum(each >= size_bytes for each in done)
        # A segment that rotted was counted when it was there, and when it came again.
        shows.update(min(*done, size_bytes), size_bytes, f"{nodes} of {len(done)} nodes")

    def _loads(self, slots: list[Segment | None], mine: Load | None) -> Iterator[Load]:
        if mine is not None:
            yield mine
        yield from self.ring.turn(slots, mine)

    def _open(self, follower: Follower | None) -> contextlib.AbstractContextManager[Landing | None]:
        if self.partial is None:
            return contextlib.nullcontext()
        with disk_errors(self.place):
            return Landing(self.partial, follower)

    def _read_ahead(self, loader: Loader) -> Iterator[tuple[list[Segment | None], Future[Load] | None]]:
        """Yield each round's segments with this leader's own on its way."""
        wanted = frozenset(number for numbers in self.rounds for number in numbers if number is not None)
        waiting: deque[tuple[list[Segment | None], Future[Load] | None]] = deque()
        for slots in rounds_of(self.rounds, self.dataset.segments(), wanted):
            own = slots[self.leaders.rank]
            waiting.append((slots, None if own is None else loader.start(own, self.pool.take())))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _complete(self, follower: Follower | None, started_s: float) -> str:
        """Publish on this node; returns the dataset's digest."""
        if self.partial is None:
            head = store.read_head(self.place.entry)
            assert head is not None
            return head.digest
        with disk_errors(self.place):
            self._require_all(self.partial)
            digest = self.dataset.key if follower is None else follower.digest()
            self._check(digest)
            self._list(digest)
            seconds = time.monotonic() - started_s
            moved = self.dataset.size_bytes - self.looked.facts.have_bytes
            head = Head(self.dataset.name, self.dataset.files, self.dataset.size_bytes, digest, moved, round(seconds, 3))
            store.complete(self.partial, self.place, head, self.looked.wrong)
        return digest

    def _confirm(self) -> None:
        """Hold a source that no digest vouches for against what it was before: one that changed was read half old, half new."""
        if self.mark is None:
            return
        try:
            self.leaders.together(self._require_unchanged)
        except HpcutilsError:
            if self.partial is not None:
                store.discard(self.partial, self.place)
            raise
        finally:
            self.origin.close()

    def _require_unchanged(self) -> None:
        path = self.dataset.name if self.dataset.entry is None else self.dataset.entry.path
        if self.origin.mark(path) != self.mark:
            raise DataError(
                f"{self.origin.where(path)} changed while it was read; nothing of it was published",
                "submit the job again when nobody writes to it, or name its sha256",
            )

    def _require_all(self, partial: Path) -> None:
        """Refuse to publish what nobody wrote down as proved and written."""
        finished = store.read_finished(partial, self.dataset.segment_bytes)
        for number in range(self.dataset.segment_count):
            if number not in finished:
                raise DataError(
                    f"segment {number} of {self.dataset.name} never got to {partial}", "submit the job again; report this, please"
                )

    def _check(self, digest: str) -> None:
        entry = self.dataset.entry
        if entry is None or entry.sha256 in (None, digest):
            return
        assert self.partial is not None
        store.discard(self.partial, self.place)
        raise IntegrityError(
            f"{self.origin.where(entry.path)}: sha256 of the {entry.size_bytes} bytes that came to {self.leaders.node} "
            f"is {digest}, not {entry.sha256}",
            "correct 'sha256' in train.yaml, or restore the file",
        )

    def _list(self, sha256: str) -> None:
        """Leave the manifest beside the files: they can be proved again without their source."""
        assert self.partial is not None
        if self.dataset.manifest is not None:
            shutil.copyfile(self.dataset.manifest.path, self.partial / LIST)
            return
        finished = store.read_finished(self.partial, self.dataset.segment_bytes)
        digests = [finished[number] for number in range(self.dataset.segment_count)]
        fs.write_text(self.partial / LIST, "".join(self.dataset.manifest_lines(digests, sha256)))


def _result(reading: Future[Load] | None) -> tuple[Load | None, HpcutilsError | None]:
    if reading is None:
        return None, None
    try:
        return reading.result(), None
    except HpcutilsError as exc:
        return None, exc
