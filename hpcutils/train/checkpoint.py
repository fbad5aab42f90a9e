"""Checkpoints: whole models with their optimizer and how far the data has come, published by rename, newest kept.

epoch-0003.keras                  three epochs are done
epoch-0003-step-00000120.keras    … and 120 steps of the fourth
epoch-0003….json                  written before: the state of the data, and what the metrics have summed up in the epoch
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from hpcutils import fs
from hpcutils.data.state import DataState
from hpcutils.errors import DataError
from hpcutils.rundir import RunDirectory

NAME = re.compile(r"^epoch-(\d{4,})(?:-step-(\d{8,}))?\.keras$")


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Args:
        epochs: Epochs that are done.
        state: Where the next one goes on; `None` at its start.
        sums: What the metrics have summed up in it, over all ranks.
    """

    epochs: int = 0
    state: DataState | None = None
    sums: tuple[float, ...] = ()


def save_model(model: Any, target: Path) -> None:
    """Write a Keras model to `target` (`.keras`) atomically."""
    with fs.publishing(target, suffix=".keras") as temporary:
        model.save(temporary)


def save_checkpoint(model: Any, run: RunDirectory, state: DataState, keep: int, sums: tuple[float, ...] = ()) -> None:
    """Write a checkpoint at `state` and remove all but the newest `keep`."""
    step = f"-step-{state.consumed // state.batch_size:08d}" if state.consumed else ""
    target = run.checkpoints / f"epoch-{state.epoch:04d}{step}.keras"
    fs.write_text(target.with_suffix(".json"), json.dumps({"data": json.loads(state.to_json()), "sums": sums}) + "\n")
    save_model(model, target)
    for old in _known(run)[:-keep]:
        fs.remove(old)
        fs.remove(old.with_suffix(".json"))


def restore(model: Any, optimizer: Any, run: RunDirectory) -> Progress:
    """Load the newest checkpoint into `model` and its `optimizer`, in place; return how far it had come.

    Raises:
        DataError: It was made in the middle of an epoch, and what it says of the data is damaged.
    """
    known = _known(run)
    if not known:
        return Progress()
    saved = keras.saving.load_model(known[-1])
    model.set_weights(saved.get_weights())
    for variable, value in zip(optimizer.variables, saved.optimizer.variables, strict=True):
        variable.assign(value)
    epochs, step = _place(known[-1])
    return _progress(known[-1].with_suffix(".json"), epochs) if step else Progress(epochs)


def _progress(path: Path, epochs: int) -> Progress:
    try:
        written = json.loads(path.read_text())
        return Progress(epochs, DataState.from_json(json.dumps(written["data"])), tuple(written["sums"]))
    except (OSError, ValueError, KeyError) as exc:
        raise DataError(f"{path}: {exc}", "remove this checkpoint: the run goes on with the one before") from exc


def _known(run: RunDirectory) -> list[Path]:
    return sorted((path for path in run.checkpoints.iterdir() if NAME.match(path.name)), key=_place)


def _place(path: Path) -> tuple[int, int]:
    match = NAME.match(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)
