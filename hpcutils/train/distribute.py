"""Gradients reduced over ranks: the only room that knows Horovod.

Horovod's own Keras optimizer and callbacks do not work under Keras 3 (horovod#4290); its TensorFlow operations do. So the Keras
optimizer's `apply` is overridden to average the gradients first, which fits any Keras 3 model and optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from hpcutils.errors import MissingPartError
from hpcutils.log import LOGGER
from hpcutils.train.ranks import Ranks


class Reducer(Protocol):
    """Averages tensors over all ranks."""

    name: str

    def average(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return the means over ranks, same shapes and dtypes; works in a `tf.function`."""

    def broadcast(self, variables: Sequence[tf.Variable]) -> None:
        """Give every rank the values of rank 0."""


class HorovodReducer:
    """Horovod over MPI (or NCCL, in an image built for it)."""

    def __init__(self, ranks: Ranks) -> None:
        import horovod
        import horovod.tensorflow as hvd

        hvd.init()
        self._hvd, self.name = hvd, f"horovod {horovod.__version__}"
        if hvd.size() != ranks.world.world_size:
            raise MissingPartError(f"Horovod sees {hvd.size()} ranks of {ranks.world.world_size}", "it must be built with MPI")

    def average(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return the means over ranks: one group, so that Horovod fuses them into one message."""
        return list(self._hvd.grouped_allreduce(list(tensors), op=self._hvd.Average))

    def broadcast(self, variables: Sequence[tf.Variable]) -> None:
        """Give every rank the values of rank 0."""
        self._hvd.broadcast_variables(list(variables), root_rank=0)


class MpiReducer:
    """mpi4py alone, for local ranks where Horovod is not built: every gradient in one flat message, through host memory."""

    def __init__(self, ranks: Ranks) -> None:
        self._comm, self._size = ranks.comm.Dup(), ranks.world.world_size
        self.name = "mpi4py"

    def average(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return the means over ranks. Float32 on the way."""
        flat = tf.concat([tf.reshape(tf.cast(tensor, tf.float32), [-1]) for tensor in tensors], axis=0)
        total = tf.ensure_shape(tf.numpy_function(self._sum, [flat], tf.float32), flat.shape)
        parts = tf.split(total / self._size, [tf.size(tensor) for tensor in tensors])
        return [tf.cast(tf.reshape(part, tf.shape(t)), t.dtype) for part, t in zip(parts, tensors, strict=True)]

    def _sum(self, flat: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        total = np.empty_like(flat)
        self._comm.Allreduce(flat, total)
        return total

    def broadcast(self, variables: Sequence[tf.Variable]) -> None:
        """Give every rank the values of rank 0."""
        values = self._comm.bcast([variable.numpy() for variable in variables])
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


def connect(ranks: Ranks) -> Reducer | None:
    """Return what averages over the ranks; `None` in a world of one.

    Horovod is what a cluster's image has; its absence is worth a line in the log there.
    """
    if ranks.comm is None:
        return None
    try:
        return HorovodReducer(ranks)
    except ImportError as exc:
        LOGGER.warning("Horovod is not installed (%s): gradients go through mpi4py", exc)
        return MpiReducer(ranks)


def distribute_optimizer(optimizer: Any, reducer: Reducer | None) -> Any:
    """Make `optimizer` average gradients over ranks before it applies them; returns the same object.

    Clipping, loss scales and accumulation come after that, and so see the gradient of the global batch. A sparse gradient (of an
    embedding) becomes dense, also in a world of one: Keras' optimizers square and clip the parts of a sparse one by themselves, so
    a word that occurs twice in a batch would count differently than when its two parts are averaged over ranks first.

    Its class becomes a subclass that keeps the original's name and module: a model saved with it loads without Horovod.

    Args:
        optimizer: Any Keras 3 optimizer, `LossScaleOptimizer` included.
        reducer: From `connect`; `None` in a world of one.
    """
    base = type(optimizer)

    def apply(self: Any, grads: Sequence[Any], trainable_variables: Any = None) -> Any:
        # Every rank runs the same model, so the same gradients are missing on all of them.
        present = [number for number, gradient in enumerate(grads) if gradient is not None]
        if not present:
            return base.apply(self, grads, trainable_variables)
        # A group of mixed kinds would be reduced one by one.
        dense = [tf.convert_to_tensor(grads[number]) for number in present]
        reduced: list[Any] = list(grads)
        for number, gradient in zip(present, dense if reducer is None else reducer.average(dense), strict=True):
            reduced[number] = gradient
        return base.apply(self, reduced, trainable_variables)

    names = {"apply": apply, "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    optimizer.__class__ = type(base.__name__, (base,), names)
    return optimizer
