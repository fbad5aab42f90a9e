"""How far an epoch has come: what a run needs to go on with the next sample, on any number of ranks. A few hundred bytes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from hpcutils.data.order import Certificate, Steps
from hpcutils.errors import DataError


@dataclass(frozen=True)
class DataState:
    """A place in the order of an epoch.

    Args:
        seed: Of the order.
        epoch: Counted from 0.
        consumed: Samples of the epoch, from the first position on, that steps have used: whole global batches.
        batch_size: Samples of a global batch.
        data: What names the data: digests of its files, and which part of them.
        order: Hash of the order (`Order.digest`).
        seen: Certificate of the consumed samples, all ranks together.
    """

    seed: int
    epoch: int
    consumed: int
    batch_size: int
    data: str
    order: str
    seen: Certificate

    def to_json(self) -> str:
        """Return the state as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> DataState:
        """Read what `to_json` wrote.

        Raises:
            DataError: It is not that.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            return cls(**fields | {"seen": Certificate(**fields["seen"])})
        except (ValueError, TypeError, KeyError) as exc:
            raise DataError(f"not a state of the data: {text[:80]!r}", "the checkpoint is damaged: take an older one") from exc

    def resume(self, order: Steps, data: str) -> int:
        """Return the step of epoch `self.epoch` to go on with.

        Args:
            order: The plan of the run that goes on; of any world.
            data: What names its data.

        At the start of an epoch another batch size may go on: each epoch still has each sample once. In its middle it may not.

        Raises:
            DataError: It is not the same data or seed, or, in the middle of an epoch, order or batch size: some samples would be
                used twice, others never.
        """
        now = {"seed": order.seed, "data": data}
        if self.consumed:
            now |= {"batch_size": order.batch_size, "order": order.name()}
        was = {name: getattr(self, name) for name in now}
        wrong = [f"{name} was {was[name]!r} and is {now[name]!r}" for name in now if was[name] != now[name]]
        if wrong:
            place = "in the middle of" if self.consumed else "with"
            raise DataError(
                f"the checkpoint cannot go on {place} epoch {self.epoch + 1}: {'; '.join(wrong)}",
                "go on with the data, the seed and the batch size that it was made with, or start a new run",
            )
        return self.consumed // self.batch_size


def state_at(order: Steps, epoch: int, step: int, data: str, seen: Certificate) -> DataState:
    """Return the state before a step; after the last one it is the start of the next epoch."""
    if step >= order.steps:
        return DataState(order.seed, epoch + 1, 0, order.batch_size, data, order.name(), Certificate())
    return DataState(order.seed, epoch, step * order.batch_size, order.batch_size, data, order.name(), seen)
