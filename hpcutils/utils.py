"""The nine utilities of the old `keras.utils` page, for a drop-in import:

    from hpcutils.utils import HDF5Matrix, Sequence, to_categorical, normalize, get_file
    from hpcutils.utils import CustomObjectScope, multi_gpu_model, print_summary, plot_model

Each lives in the room of its concern and is loaded when it is first asked for: importing this module imports none of
TensorFlow, Keras, h5py or MPI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcutils.data.arrays import normalize, to_categorical
    from hpcutils.data.hdf5 import HDF5Matrix
    from hpcutils.data.sequence import Sequence
    from hpcutils.models.custom_objects import CustomObjectScope
    from hpcutils.models.plot import plot_model
    from hpcutils.models.replication import multi_gpu_model
    from hpcutils.models.summary import print_summary
    from hpcutils.staging.get_file import get_file

_HOMES = {
    "CustomObjectScope": "hpcutils.models.custom_objects",
    "HDF5Matrix": "hpcutils.data.hdf5",
    "Sequence": "hpcutils.data.sequence",
    "get_file": "hpcutils.staging.get_file",
    "multi_gpu_model": "hpcutils.models.replication",
    "normalize": "hpcutils.data.arrays",
    "plot_model": "hpcutils.models.plot",
    "print_summary": "hpcutils.models.summary",
    "to_categorical": "hpcutils.data.arrays",
}

__all__ = [
    "CustomObjectScope",
    "HDF5Matrix",
    "Sequence",
    "get_file",
    "multi_gpu_model",
    "normalize",
    "plot_model",
    "print_summary",
    "to_categorical",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
