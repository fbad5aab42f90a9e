"""A job's model without training it: for `hpcutils summary` and `hpcutils plot`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpcutils.errors import SpecError
from hpcutils.specs.job import load_job

SAVED = {".keras", ".h5", ".hdf5"}
REFERENCE = re.compile(r"(?:(?P<name>[^=]+)=)?(?P<file>[^=:]+\.py):(?P<object>\w+)")


@contextmanager
def open_model(source: Path, references: Sequence[str] = ()) -> Iterator[Any]:
    """Yield the Keras model of a `train.yaml`, or the one saved in a file, with its custom objects known.

    Args:
        source: The `train.yaml`, or the file.
        references: Custom objects beside those of a `train.yaml`, each as `file.py:Name` or `name=file.py:Name`; files are
            relative to the current folder.

    Raises:
        SpecError: Neither of the two, a reference leads nowhere, or the model cannot be built or loaded.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    from hpcutils.models.custom_objects import CustomObjectScope

    if source.suffix in SAVED:
        if not source.is_file():
            raise SpecError(f"{source}: no such file", "give a train.yaml, or a saved model (.keras, .h5)")
        with CustomObjectScope(_objects(references)):
            yield _load(source)
        return
    job = load_job(source)
    from hpcutils.train.session import build_model, custom_objects

    folder = source.resolve().parent
    with custom_objects(job, folder), CustomObjectScope(_objects(references)):
        yield build_model(job, folder)


def _objects(references: Sequence[str]) -> dict[str, Any]:
    """Return what the references name.

    Raises:
        SpecError: One is not of the form `name=file.py:Name`, or there is no such file or object.
    """
    from hpcutils.train.usercode import load_function

    found = {}
    for given in references:
        match = REFERENCE.fullmatch(given)
        if match is None:
            raise SpecError(f"custom object {given!r} was given", "write file.py:Name or name=file.py:Name")
        path = Path(match["file"]).resolve()
        found[match["name"] or match["object"]] = load_function(f"{path.name}:{match['object']}", path.parent)
    return found


def _load(source: Path) -> Any:
    import keras

    try:
        return keras.saving.load_model(source, compile=False)
    except (ValueError, OSError, TypeError) as exc:
        raise SpecError(
            f"{source} cannot be loaded as a Keras model: {exc}",
            "custom objects are known through a train.yaml, or with --custom-objects name=file.py:Name",
        ) from exc
