"""Loss and metrics of models with masked outputs (sequences of unequal length): means over the valid steps of the global batch.

Keras divides a rank's loss by the valid elements of that rank's rows, padding rows included. Ranks have unequal numbers of them, so
the mean over ranks would be that of no batch. Here the weights of a rank's rows are set right before: one small allreduce a step.
Nor does Keras 3 take a weight a row beside a mask a step: the weights get the mask's shape.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from hpcutils.train.distribute import Reducer


def count_over_ranks(model: Any, reducer: Reducer | None) -> None:
    """Make a model's loss count valid elements over all ranks, where its output has a mask.

    A model that has a `compute_loss` or a `compute_metrics` of its own keeps it.

    Args:
        model: A compiled Keras model with one output; each batch comes with the weights of `Feed`.
        reducer: Averages over the ranks; `None` for a rank alone.
    """
    loss_of, metrics_of = model.compute_loss, model.compute_metrics

    def compute_loss(x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True) -> Any:
        mask = getattr(y_pred, "_keras_mask", None)
        if mask is not None and sample_weight is not None:
            sample_weight = like_mask(weights_over_ranks(mask, sample_weight, reducer), mask)
        return loss_of(x, y, y_pred, sample_weight, training=training)

    def compute_metrics(x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        mask = getattr(y_pred, "_keras_mask", None)
        if mask is not None and sample_weight is not None:
            sample_weight = like_mask(sample_weight, mask)
        return metrics_of(x, y, y_pred, sample_weight)

    if type(model).compute_loss is keras.Model.compute_loss:
        model.compute_loss = compute_loss
    if type(model).compute_metrics is keras.Model.compute_metrics:
        model.compute_metrics = compute_metrics


def weights_over_ranks(mask: Any, weights: Any, reducer: Reducer | None) -> Any:
    """Return weights with which the mean over ranks of each rank's masked mean is the masked mean over the global batch.

    With W ranks of R rows, n real rows and V valid elements in all of them, and v valid elements in all rows of this rank, Keras
    divides by v: a real row, of weight u W R / n, gets u W v / V.

    Args:
        mask: `(rows, ...)` bool, of the output.
        weights: `(rows,)` from `Feed`; 0 for padding.
        reducer: Averages over the ranks, or `None`.
    """
    # (rows,): valid elements of each.
    valid = tf.cast(tf.math.count_nonzero(tf.reshape(mask, [tf.shape(mask)[0], -1]), axis=1), tf.float32)
    real = tf.cast(weights != 0, tf.float32)
    # Means over ranks, of real rows and of valid elements in them: n / W and V / W.
    counts = tf.stack([tf.reduce_sum(real), tf.reduce_sum(valid * real)])
    (counts,) = reducer.average([counts]) if reducer is not None else (counts,)
    scale = tf.math.divide_no_nan(counts[0] * tf.reduce_sum(valid), counts[1] * tf.cast(tf.shape(weights)[0], tf.float32))
    return weights * tf.cast(scale, weights.dtype)


def like_mask(weights: Any, mask: Any) -> Any:
    """Return a weight for each element of the mask: `(rows,)` to the shape of `mask`."""
    shape = [-1, *[1] * (len(mask.shape) - 1)]
    return tf.broadcast_to(tf.reshape(weights, shape), tf.shape(mask))
