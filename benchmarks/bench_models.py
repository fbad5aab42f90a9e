"""`models` beside Keras' own: the summary, the `.dot` file, the name scope, and what replication costs.

    python -m benchmarks.bench_models [--json]

Replication runs on two logical devices of one CPU, whose cores the template alone may use as well. So the figure is not a
speed-up of GPUs; it shows what splitting, a second set of operations and joining cost, beside what it brings that two
devices work side by side. `split by hand` is what one would write with `tf.device` alone; its backward pass all runs on the
first device, which on one CPU costs nothing and on GPUs everything.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# With oneDNN, convolutions on logical CPU devices die; read when TensorFlow is imported.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import keras
import numpy as np
import tensorflow as tf

from benchmarks.harness import Ratio, compare, report
from hpcutils.models.custom_objects import CustomObjectScope
from hpcutils.models.plot import plot_model
from hpcutils.models.replication import devices_here, multi_gpu_model
from hpcutils.models.summary import print_summary

ROWS = 64


def pictures() -> list[Ratio]:
    """A model of 155 layers, printed and written as `.dot`."""
    model = keras.applications.MobileNetV2(weights=None)
    lines = io.StringIO()
    rows = compare(
        "summary, 155 layers",
        lambda: print_summary(model, print_fn=lambda line: lines.write(line)),
        {"keras": lambda: model.summary(print_fn=lambda text: lines.write(text))},
    )
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours.dot"), Path(folder, "theirs.dot")
        return rows + compare(
            "dot file, 155 layers, shapes (ours: fsync)",
            lambda: plot_model(model, ours, show_shapes=True),
            {"keras": lambda: theirs.write_text(keras.utils.model_to_dot(model, show_shapes=True, dpi=96).to_string())},
        )


def scopes() -> list[Ratio]:
    """Entering and leaving a scope 1000 times."""
    objects = {"MyObject": keras.regularizers.L2}

    def enter(scope: Callable[[], Any]) -> Callable[[], None]:
        def many() -> None:
            for _ in range(1000):
                with scope():
                    pass

        return many

    theirs = enter(lambda: keras.saving.CustomObjectScope(objects))
    return compare("CustomObjectScope x1000", enter(lambda: CustomObjectScope(objects)), {"keras (one thread)": theirs})


def convolutional() -> Any:
    layers = keras.layers
    model = keras.Sequential([keras.Input((64, 64, 3))])
    for filters in (32, 64, 64):
        model.add(layers.Conv2D(filters, 3, activation="relu"))
        model.add(layers.BatchNormalization())
        model.add(layers.MaxPooling2D())
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10, activation="softmax"))
    return model


def by_hand(model: Any) -> Any:
    """Split a batch with `tf.device` and nothing else."""
    inputs = keras.Input(model.input_shape[1:])

    class Split(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            parts = tf.split(x, len(devices_here()))
            outputs = []
            for device, part in zip(devices_here(), parts, strict=True):
                with tf.device(device):
                    outputs.append(model(part))
            return tf.concat(outputs, 0)

        def compute_output_shape(self, shape: Any) -> Any:
            return model.output_shape

    layer = Split()
    layer.model = model
    return keras.Model(inputs, layer(inputs))


def replication() -> list[Ratio]:
    """`predict` and one training step of the same weights, whole and replicated."""
    template = convolutional()
    models = {"ours": multi_gpu_model(template), "template": template, "split by hand": by_hand(convolutional())}
    x = np.random.default_rng(0).random((ROWS, 64, 64, 3), dtype="float32")
    y = np.eye(10, dtype="float32")[np.arange(ROWS) % 10]
    predict, train = {}, {}
    for name, model in models.items():
        model.compile(loss="categorical_crossentropy", optimizer="sgd")
        predict[name] = lambda model=model: model.predict_on_batch(x)
        train[name] = lambda model=model: model.train_on_batch(x, y)
    count = len(devices_here())
    return [
        *compare(f"predict, {ROWS} images, {count} devices", predict.pop("ours"), predict),
        *compare(f"training step, {ROWS} images, {count} devices", train.pop("ours"), train),
    ]


def main() -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    report([*pictures(), *scopes(), *replication()])


if __name__ == "__main__":
    main()
