"""A job's model without training it: for `hpcutils summary` and `hpcutils plot`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpcutils.errors import SpecError
from hpcutils.specs.job import load_job

SAVED = {".keras", ".h5", ".hdf5"}


@contextmanager
def open_model(source: Path) -> Iterator[Any]:
    """Yield the Keras model of a `train.yaml`, or the one saved in a file, with its custom objects known.

    Raises:
        SpecError: Neither of the two, or the model cannot be built or loaded.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    if source.suffix in SAVED:
        yield _load(source)
        return
    job = load_job(source)
    from hpcutils.train.session import build_model, custom_objects

    folder = source.resolve().parent
    with custom_objects(job, folder):
        yield build_model(job, folder)


def _load(source: Path) -> Any:
    if not source.is_file():
        raise SpecError(f"{source}: no such file", "give a train.yaml, or a saved model (.keras, .h5)")
    import keras

    try:
        return keras.saving.load_model(source, compile=False)
    except (ValueError, OSError, TypeError) as exc:
        raise SpecError(
            f"{source} cannot be loaded as a Keras model: {exc}", "custom objects are known through a train.yaml"
        ) from exc
