"""Checkpoints at the end of epochs: whole models with their optimizer, published by rename, newest kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import keras

from hpcutils import fs
from hpcutils.rundir import RunDirectory

NAME = re.compile(r"^epoch-(\d{4,})\.keras$")


def save_model(model: Any, target: Path) -> None:
    """Write a Keras model to `target` (`.keras`) atomically."""
    with fs.publishing(target, suffix=".keras") as temporary:
        model.save(temporary)


def save_checkpoint(model: Any, run: RunDirectory, epoch: int, keep: int) -> None:
    """Write the checkpoint after `epoch` epochs and remove all but the newest `keep`."""
    save_model(model, run.checkpoints / f"epoch-{epoch:04d}.keras")
    for old in _known(run)[:-keep]:
        fs.remove(old)


def restore(model: Any, optimizer: Any, run: RunDirectory) -> int:
    """Load the newest checkpoint into `model` and its `optimizer`, in place.

    Returns:
        The epochs that are done; 0 when there is no checkpoint.
    """
    known = _known(run)
    if not known:
        return 0
    saved = keras.saving.load_model(known[-1])
    model.set_weights(saved.get_weights())
    for variable, value in zip(optimizer.variables, saved.optimizer.variables, strict=True):
        variable.assign(value)
    return _epoch(known[-1])


def _known(run: RunDirectory) -> list[Path]:
    return sorted((path for path in run.checkpoints.iterdir() if NAME.match(path.name)), key=_epoch)


def _epoch(path: Path) -> int:
    match = NAME.match(path.name)
    assert match is not None
    return int(match[1])
