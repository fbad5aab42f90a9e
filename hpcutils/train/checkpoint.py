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
        state: Where the next one goes on, its very start included; `None` where there is no checkpoint.
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
        DataError: What it says of the data is damaged or missing.
    """
    known = _known(run)
    if not known:
        return Progress()
    saved = keras.saving.load_model(known[-1])
    model.set_weights(saved.get_weights())
    for variable, value in zip(optimizer.variables, saved.optimizer.variables, strict=True):
        variable.assign(value)
    return _progress(known[-1])


def _progress(model: Path) -> Progress:
    """Read what a checkpoint says of the data; that is the same place as its name says."""
    path = model.with_suffix(".json")
    try:
        written = json.loads(path.read_text())
        state = DataState.from_json(json.dumps(written["data"]))
        if (state.epoch, state.consumed // state.batch_size) != _place(model):
            raise ValueError(f"it is of epoch {state.epoch}, sample {state.consumed}")
        return Progress(state.epoch, state, tuple(written["sums"]))
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as exc:
        raise DataError(f"{path}: {exc}", "remove this checkpoint: the run goes on with the one before") from exc


def _known(run: RunDirectory) -> list[Path]:
    return sorted((path for path in run.checkpoints.iterdir() if NAME.match(path.name)), key=_place)


def _place(path: Path) -> tuple[int, int]:
    match = NAME.match(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)
