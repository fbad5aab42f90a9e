"""One replica's work inside `parallel.ParallelModel`: cut the batch, run a part on its device, join what the parts return.

Two things here are not obvious. Both were measured; `replication.placement` shows them.

*The gradient needs pinning too.* TensorFlow places the backward pass by itself: `tf.device` around the forward pass leaves
every replica's gradient on the first device, with all activations copied there. So each replica is a function with a
gradient of its own (`pinned`), which runs where the forward pass ran.

*A replica writes nothing.* It runs in a stateless scope that collects what it would write (moving statistics, seeds) and
the losses that its layers add. These are joined once, so neither a momentum nor a penalty is applied once a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.src import backend  # Masks and AutocastScope have no public name in Keras 3.

Tensor = Any
Structure = Any


class Part(NamedTuple):
    """One replica's rows of the batch: `start` and `stop` (scalars, int32), and its share of the batch (float32)."""

    start: Tensor
    stop: Tensor
    share: Tensor


class Split(NamedTuple):
    """How a batch is cut: one part a replica, and how many borrowed rows lead the joined outputs."""

    parts: list[Part]
    borrowed: Tensor


@dataclass
class Outcome:
    """What one replica computed, beside its float tensors, which travel through `pinned`.

    Attributes:
        structure: The outputs as the template nests them.
        masks: A Keras mask, or `None`, for each flat output.
        updates: `id(variable)` to the variable and the value that the replica would write.
    """

    structure: Structure = None
    masks: list[Tensor] = field(default_factory=list)
    updates: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)


class ReplicaScope(keras.StatelessScope):  # type: ignore[misc]
    """A stateless scope that reads `values` and remembers which variables would be written.

    Args:
        values: `id(variable)` to tensor. They go past the checks of `state_mapping=`, which would round float32 weights
            to float16 under mixed precision.
    """

    def __init__(self, values: dict[int, Tensor]) -> None:
        super().__init__(collect_losses=True)
        self.state_mapping.update(values)
        self.updates: dict[int, tuple[Any, Tensor]] = {}

    def add_update(self, update: tuple[Any, Tensor]) -> None:
        super().add_update(update)
        self.updates[id(update[0])] = update


def as_tensor(value: Any) -> Tensor:
    """Return `value` as a tensor; an absent optional input and sparse or ragged tensors stay as they are."""
    if value is None or isinstance(value, tf.SparseTensor | tf.RaggedTensor):
        return value
    return tf.convert_to_tensor(value)


def batch_size(inputs: Structure) -> Tensor:
    """Return the number of rows (scalar, int32) of the first input that is there."""
    first = next(leaf for leaf in keras.tree.flatten(inputs) if leaf is not None)
    if isinstance(first, tf.SparseTensor):
        return tf.cast(first.dense_shape[0], tf.int32)
    return tf.cast(first.nrows(), tf.int32) if isinstance(first, tf.RaggedTensor) else tf.shape(first)[0]


def split_batch(rows: Tensor, count: int) -> Split:
    """Cut `rows` into `count` parts of equal size, the remainder to the last.

    A batch smaller than `count` gives all but the last replica nothing, and layers fail on nothing: the mean of no row is
    not a number. Such a replica borrows row 0; its share is 0, and the join drops the row.
    """
    size = rows // count
    # An empty batch divides by 1: shares of 0.
    whole = tf.cast(tf.maximum(rows, 1), tf.float32)
    starts = [index * size for index in range(count)]
    parts = [Part(start, tf.maximum(start + size, 1), tf.cast(size, tf.float32) / whole) for start in starts[:-1]]
    parts.append(Part(starts[-1], rows, tf.cast(rows - starts[-1], tf.float32) / whole))
    return Split(parts, tf.where(size > 0, 0, count - 1))


def take_rows(inputs: Structure, mask: Structure, part: Part) -> Structure:
    """Return the part's rows of every input, with their Keras masks attached."""
    taken = [cut_rows(leaf, part) for leaf in keras.tree.flatten(inputs)]
    masks = [None] * len(taken) if mask is None else keras.tree.flatten(mask)
    for leaf, leaf_mask in zip(taken, masks, strict=True):
        if leaf_mask is not None:
            backend.set_keras_mask(leaf, cut_rows(leaf_mask, part))
    return keras.tree.pack_sequence_as(inputs, taken)


def cut_rows(tensor: Tensor, part: Part) -> Tensor:
    """Return rows `part.start` to `part.stop` of a dense, ragged, sparse or absent tensor."""
    if isinstance(tensor, tf.SparseTensor):
        shape = tf.cast(tensor.dense_shape, tf.int64)
        first = tf.cast(part.start, tf.int64)
        rows = tf.cast(part.stop, tf.int64) - first
        zeros = tf.zeros_like(shape[1:])
        return tf.sparse.slice(tensor, tf.concat([[first], zeros], 0), tf.concat([[rows], shape[1:]], 0))
    return None if tensor is None else tensor[part.start : part.stop]


def read_values(template: Any) -> dict[int, Tensor]:
    """Read every variable once: one copy travels to each device, however many layers and passes use it."""
    with backend.AutocastScope(None):
        return {id(variable): tf.convert_to_tensor(variable) for variable in template.variables}


def pass_on(values: dict[int, Tensor], outcome: Outcome) -> dict[int, Tensor]:
    """Give the next replica the seeds and counters of this one, so that no two draw the same random numbers."""
    counted = {key: value for key, (_, value) in outcome.updates.items() if not value.dtype.is_floating}
    return {**values, **counted}


def run(template: Any, rows: Structure, values: dict[int, Tensor], device: str, index: int) -> tuple[list[Tensor], Outcome]:
    """Run the template on one replica's rows.

    Args:
        template: The model.
        rows: This replica's inputs.
        values: `id(variable)` to the value that the replica reads.
        device: Where everything runs, the gradient included.
        index: The replica's number, for the names of its operations.

    Returns:
        The flat outputs followed by the losses that layers added, and the rest of what happened.
    """
    flat = keras.tree.flatten(rows)
    # Only dense float tensors carry a gradient. The others reach `forward` by closure.
    places = [place for place, leaf in enumerate(flat) if carries_gradient(leaf)]
    keys = [key for key, value in values.items() if carries_gradient(value)]
    outcome = Outcome()

    def forward(*sources: Tensor) -> list[Tensor]:
        own = dict(zip(places, sources, strict=False))
        leaves = [keep_mask(leaf, own.get(place, leaf)) for place, leaf in enumerate(flat)]
        known = {**values, **dict(zip(keys, sources[len(places) :], strict=True))}
        with ReplicaScope(known) as scope:
            outcome.structure = template(keras.tree.pack_sequence_as(rows, leaves))
        outputs = keras.tree.flatten(outcome.structure)
        outcome.masks = [backend.get_keras_mask(output) for output in outputs]
        outcome.updates = scope.updates
        return [*outputs, *scope.losses]

    sources = [flat[place] for place in places] + [values[key] for key in keys]
    return pinned(forward, device, f"replica_{index}")(*sources), outcome


def carries_gradient(tensor: Tensor) -> bool:
    """Whether `tensor` is dense and of floating point."""
    return isinstance(tensor, tf.Tensor) and tensor.dtype.is_floating


def keep_mask(old: Tensor, new: Tensor) -> Tensor:
    """Return `new` with the Keras mask of `old`: `pinned` hands over fresh tensors."""
    mask = None if old is None else backend.get_keras_mask(old)
    if mask is not None:
        backend.set_keras_mask(new, mask)
    return new


def pinned(forward: Callable[..., list[Tensor]], device: str, name: str) -> Callable[..., list[Tensor]]:
    """Return `forward` with both its passes on `device`, under the name scope `name`.

    Args:
        forward: Float tensors to a list of tensors.
        device: A TensorFlow device name.
        name: Prefix of the operations' names.
    """

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def both(*sources: Tensor) -> tuple[list[Tensor], Callable[..., Any]]:
        # Persistent: whoever differentiates may do it twice.
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(sources)
            results = forward(*sources)
        targets = [place for place, result in enumerate(results) if carries_gradient(result)]

        def gradient(*upstream: Tensor, variables: Sequence[Any] = ()) -> Any:
            # `variables` are plain tf.Variables of custom layers: Keras' own are among the sources.
            with tf.device(device), tf.name_scope(f"{name}_gradient"):
                found = tape.gradient(
                    [results[place] for place in targets],
                    [*sources, *variables],
                    output_gradients=[upstream[place] for place in targets],
                )
            return (found[: len(sources)], found[len(sources) :]) if variables else found

        return results, gradient

    def call(*sources: Tensor) -> list[Tensor]:
        with tf.device(device), tf.name_scope(name):
            return list(both(*sources))

    return call


def join(results: list[list[Tensor]], outcomes: list[Outcome], split: Split) -> tuple[Structure, list[Tensor]]:
    """Join the replicas' results in the order of the batch.

    Args:
        results: For each replica its flat outputs, followed by its losses.
        outcomes: For each replica what else happened.
        split: How the batch was cut.

    Returns:
        The outputs, nested as the template nests them and with their Keras masks, and the losses.
    """
    count = len(keras.tree.flatten(outcomes[0].structure))
    columns = list(zip(*results, strict=True))
    outputs = [join_rows(column, split) for column in columns[:count]]
    for output, masks in zip(outputs, zip(*(outcome.masks for outcome in outcomes), strict=True), strict=True):
        if masks[0] is not None:
            backend.set_keras_mask(output, join_rows(masks, split))
    return keras.tree.pack_sequence_as(outcomes[0].structure, outputs), [join_losses(c, split) for c in columns[count:]]


def join_rows(parts: Sequence[Tensor], split: Split) -> Tensor:
    """Concatenate along the batch and drop the borrowed rows, which come first."""
    return tf.concat(list(parts), axis=0)[split.borrowed :]


def join_losses(parts: Sequence[Tensor], split: Split) -> Tensor:
    """Join one `add_loss` of every replica.

    A scalar counts as a mean over its replica's rows and is weighted by the replica's share; the template's value results.
    Anything else counts as a loss a sample and is joined by rows.
    """
    if parts[0].shape.rank != 0:
        return join_rows(parts, split)
    return weighted_mean(parts, split)


def weighted_mean(parts: Sequence[Tensor], split: Split) -> Tensor:
    """Return the mean of `parts`, each weighted by its replica's share of the batch."""
    return tf.add_n([tf.cast(p.share, value.dtype) * value for p, value in zip(split.parts, parts, strict=True)])


def write_state(outcomes: list[Outcome], split: Split) -> None:
    """Write what the replicas would have written, once.

    Floating-point state (moving statistics) becomes the replicas' mean, weighted by their rows: all started from the same
    value, so momentum is applied once a step however many devices there are. Other state (seeds, counters) went from
    replica to replica, so the last one holds it.
    """
    for key, (variable, last) in outcomes[-1].updates.items():
        values = [outcome.updates[key][1] for outcome in outcomes]
        variable.assign(weighted_mean(values, split) if last.dtype.is_floating else last)
