"""User Sequences as training data: whole batches, dealt out over the ranks, made ahead by workers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hpcutils.data.batches import BatchCut, BatchEpoch, BatchOrder
from hpcutils.data.order import Rows, Seat
from hpcutils.errors import DataError
from hpcutils.log import LOGGER
from hpcutils.specs.job import Job
from hpcutils.staging.items import Staged
from hpcutils.train.feed import Array, Arrays, Feed, Make, native
from hpcutils.train.pipeline import Copy, Form, Recipe, form_of, rebuilt
from hpcutils.train.ranks import Ranks
from hpcutils.train.workers import InProcess, InThread, Workers

TRAINING, HELD_OUT = "training data", "held-out data"


class SequenceFeed(Feed):
    """The batches of one rank: those of the user's that the order gives it, joined to one array a step.

    Args:
        which: What the workers know the Sequence by.
        copy: This rank's own copy of it.
        form: What its batches are like.
        order: Which batches this rank takes at each step.
        workers: What makes them.
        mode: How.
    """

    def __init__(self, which: str, copy: Copy, form: Form, order: BatchOrder, workers: Workers, mode: str) -> None:
        super().__init__(order, mode)
        self.copy, self.form = copy, form
        self._which, self._order, self._workers = which, order, workers
        self._taken = 0

    def example(self) -> Arrays:
        """Return a batch of the rows of batch 0, with weights of 0."""
        return self._joined([], BatchCut(np.zeros(0, np.int64), np.zeros(self.order.local_rows, np.float32)))

    def pack(self, parts: tuple[Any, ...]) -> Any:
        """Return the arrays of a batch as `(x, y, weight)`, x as the Sequence has it."""
        *x, y, weight = parts
        return rebuilt(self.form.example[0], iter(x)), y, weight

    def chunks_read(self, epoch: int) -> int:
        """Return how many batches this rank took in the epoch that it is at."""
        return self._taken

    def end_epoch(self) -> None:
        """Let this rank's copy end its epoch; those of worker processes do when the next one begins."""
        self.copy.end()

    def _begin(self, epoch: int, first_step: int) -> Make:
        self.copy.begin(epoch)
        self._taken = 0
        cuts = self._order.epoch(epoch)
        made = self._workers.ahead(self._which, epoch, numbers_of(self._order.epoch(epoch), first_step))

        def make(step: int) -> tuple[Arrays, Rows]:
            cut = cuts.cut(step)
            batches = [self._checked(next(made), number) for number in cut.numbers.tolist()]
            self._taken += len(batches)
            return self._joined(batches, cut), cut.numbers

        return make

    def _release(self) -> None:
        """Nothing to do: the workers are shared."""

    def _checked(self, batch: Any, number: int) -> list[Array]:
        is_last = number == self._order.batches - 1
        return self.form.check(batch, number, self._order.last_rows if is_last else self._order.rows)

    def _joined(self, batches: list[list[Array]], cut: BatchCut) -> Arrays:
        """Return the arrays of x, y and the weights, `(local_rows, ...)` each."""
        rows = self.order.local_rows
        # Padding takes real samples: this rank's own of the step, or those of batch 0 where it has none.
        sources = batches or [self.form.arrays]
        *parts, last = (padded([native(batch[place]) for batch in sources], rows) for place in range(len(sources[0])))
        if not self.form.is_weighted:
            return *parts, last, cut.weights
        # (rows, ...): the user's weights, each row times its own.
        return *parts, (last.astype(np.float32).T * cut.weights).T


def numbers_of(epoch: BatchEpoch, first_step: int) -> Iterator[int]:
    """Yield the numbers of the batches that a rank takes from a step on."""
    for step in range(first_step, epoch.order.steps):
        yield from epoch.cut(step).numbers.tolist()


def padded(arrays: list[Array], rows: int) -> Array:
    """Return the arrays one after the other, from the first row again until there are `rows`."""
    whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return whole if len(whole) == rows else whole[np.arange(rows) % len(whole)]


@contextmanager
def open_sequences(job: Job, code: Path, ranks: Ranks, staged: dict[str, Staged]) -> Iterator[tuple[Feed, Feed | None]]:
    """Yield this rank's training and held-out batches; all ranks agree on both before the first step."""
    recipes = recipes_of(job, code, staged)
    # The processes import what they need while this one makes its own copies.
    processes = [InProcess(recipes) for _ in range(job.data.workers)] if job.data.use_processes else []
    copies = {which: ranks.together(lambda recipe=recipe: Copy(recipe)) for which, recipe in recipes.items()}  # type: ignore[misc]
    workers = Workers(processes or [InThread(copies) for _ in range(job.data.workers)])
    mode = "processes" if processes else "threads"

    feeds = []
    for which, copy in copies.items():
        form, order = plan(copy, job, ranks, shuffle=which == TRAINING)
        if ranks.world.rank == 0:
            LOGGER.info(
                "%s: %d samples in %d batches of %d, %d steps of %d, made by %d %s a rank",
                *(which, order.samples, order.batches, order.rows, order.steps, order.batch_size, job.data.workers, mode),
            )
            warn_of_idle_ranks(order)
        feeds.append(SequenceFeed(which, copy, form, order, workers, mode))
    yield feeds[0], feeds[1] if len(feeds) > 1 else None
    # Not in a `finally`: after an error nothing waits, and the processes end with this one.
    workers.close()


def recipes_of(job: Job, code: Path, staged: dict[str, Staged]) -> dict[str, Recipe]:
    """Return how the job's Sequences are made."""
    references = {TRAINING: job.data.sequence, HELD_OUT: job.data.validation_sequence}
    files = {name: str(file.path) for name, file in staged.items()}
    return {
        which: Recipe(reference, str(code), job.data.args, files, job.training.seed)
        for which, reference in references.items()
        if reference is not None
    }


def plan(copy: Copy, job: Job, ranks: Ranks, *, shuffle: bool) -> tuple[Form, BatchOrder]:
    """Look at a Sequence's first and last batch and return what it is like, and its order; the same on all ranks.

    Raises:
        DataError: The ranks' copies differ, or do not fit the global batch.
    """
    seat = Seat(ranks=ranks.world.world_size, rank=ranks.world.rank)

    def look() -> tuple[Form, BatchOrder]:
        form = form_of(copy.make(0), copy.recipe.reference)
        last = copy.make(copy.batches - 1) if copy.batches > 1 else form.example
        last_rows = len(form.check(last, copy.batches - 1)[0])
        sizes = (copy.batches, form.rows, last_rows, job.training.batch_size)
        return form, BatchOrder(*sizes, seat, job.training.seed, shuffle)

    form, order = ranks.together(look)
    agree(form, order, ranks)
    return form, order


def agree(form: Form, order: BatchOrder, ranks: Ranks) -> None:
    """Compare the Sequence over ranks: a disagreement is an error here, and would be a hang or lost samples later."""
    plans = ranks.gather((order.batches, form.rows, order.last_rows, form.parts, order.digest()))
    for rank, other in enumerate(plans):
        if other != plans[0]:
            raise DataError(
                f"{form.reference}: rank {rank} has {_said(other)}; rank 0 has {_said(plans[0])}",
                "the function must make the same Sequence on every rank: do the nodes see the same data?",
            )
    if len(set(ranks.gather(digest_of(form)))) > 1 and ranks.world.rank == 0:
        LOGGER.warning(
            "%s: batch 0 is not the same on all ranks; harmless where only __getitem__ draws random numbers, but an order of "
            "samples that each rank draws for itself uses some twice and others never: seed it",
            form.reference,
        )


def _said(plan: tuple[Any, ...]) -> str:
    batches, rows, last_rows, parts, digest = plan
    arrays = ", ".join(f"{name} {dtype} {shape}" for name, shape, dtype in parts)
    return f"{batches} batches of {rows} rows, {last_rows} in the last ({arrays}; order {digest[-1]})"


def digest_of(form: Form) -> str:
    """Return a hash over the first batch."""
    state = hashlib.sha256()
    for array in form.arrays:
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()


def warn_of_idle_ranks(order: BatchOrder) -> None:
    """Log where a step has fewer batches than there are ranks."""
    each, ranks = order.plan.batch_size, order.seat.world_size
    if each < ranks:
        LOGGER.warning(
            "a step has %d batches of the Sequence for %d ranks: some only compute padding; a batch_size of %d, or smaller "
            "batches, would give each rank its own",
            *(each, ranks, order.rows * ranks),
        )
