"""Checks of the replicated model, for a process whose CPU is split into logical devices: `replication_checks.py COUNT`.

TensorFlow splits the CPU only before it starts, and takes seconds to import: `test_replication.py` starts this script once
a device count and reads its report (JSON on stdout: check name to "ok" or a traceback). Importing the module imports no
TensorFlow, so that the tests can list the checks.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Device count to its checks: two devices take them all, four those where the number matters.
CHECKS: dict[int, dict[str, Callable[[], None]]] = {2: {}, 4: {}}
TOLERANCE = 1e-5

np: Any = None
tf: Any = None
keras: Any = None
layers: Any = None
COUNT = 0


def check(*counts: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(function: Callable[[], None]) -> Callable[[], None]:
        for count in counts:
            CHECKS[count][function.__name__] = function
        return function

    return register


def start(count: int) -> None:
    """Import TensorFlow with `count` logical CPU devices. With oneDNN, convolutions on several of them die."""
    global np, tf, keras, layers, COUNT
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    import keras as keras_
    import numpy as np_
    import tensorflow as tf_

    np, tf, keras, layers, COUNT = np_, tf_, keras_, keras_.layers, count
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    keras.utils.set_random_seed(7)


def main() -> None:
    start(int(sys.argv[1]))
    report = {}
    for name, function in CHECKS[COUNT].items():
        try:
            function()
            report[name] = "ok"
        except Exception:  # noqa: BLE001 (the end of this process; the parent reports it)
            report[name] = traceback.format_exc()
    print(json.dumps(report))


# ---- models and comparisons


def convolutional(*, batch_norm: bool = False) -> Any:
    inputs = keras.Input((9, 9, 3))
    x = layers.Conv2D(6, 3, activation="relu", kernel_regularizer="l2")(inputs)
    if batch_norm:
        x = layers.BatchNormalization(momentum=0.9)(x)
    x = layers.SeparableConv2D(4, 3, activity_regularizer=keras.regularizers.L2(0.1))(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(5, activation="softmax")(x), name="small")


def images(rows: int) -> Any:
    return np.random.default_rng(rows).random((rows, 9, 9, 3), dtype="float32")


def parallel_of(model: Any, **options: Any) -> Any:
    from hpcutils.models.replication import multi_gpu_model

    return multi_gpu_model(model, **options)


def assert_close(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> None:
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), as_arrays(ours), as_arrays(theirs)
    )


def as_arrays(values: Any) -> Any:
    return tf.nest.map_structure(lambda v: np.asarray(tf.convert_to_tensor(v)), values)


def loss_and_gradients(model: Any, x: Any, graph: bool, training: bool = True) -> tuple[Any, list[Any]]:
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            outputs = tf.nest.flatten(model(x, training=training))
            loss = tf.add_n([tf.reduce_mean(tf.square(y)) for y in outputs] + [tf.reduce_sum(v) for v in model.losses])
        return loss, tape.gradient(loss, model.trainable_variables)

    return (tf.function(step) if graph else step)(x)


def assert_same_gradients(model: Any, x: Any, training: bool = True) -> None:
    parallel = parallel_of(model)
    for graph in (False, True):
        expected, found = (loss_and_gradients(m, x, graph, training) for m in (model, parallel))
        assert all(g is not None for g in found[1])
        assert_close(found, expected)


# ---- outputs and gradients


@check(2, 4)
def outputs_equal_the_templates_for_every_batch_size() -> None:
    model = convolutional(batch_norm=True)
    parallel = parallel_of(model)
    for rows in (257, 2 * COUNT, COUNT + 1, COUNT, COUNT - 1, 1):
        assert_close(parallel(images(rows)), model(images(rows)))
    # Batches of 100, 100 and 57.
    whole = images(257)
    assert_close(parallel.predict(whole, batch_size=100, verbose=0), model.predict(whole, batch_size=100, verbose=0))


@check(2)
def an_empty_batch_gives_empty_outputs() -> None:
    assert parallel_of(convolutional())(images(0)).shape == (0, 5)


@check(2, 4)
def gradients_equal_the_templates() -> None:
    model = convolutional()
    for rows in (33, COUNT):
        assert_same_gradients(model, images(rows))


@check(2, 4)
def a_batch_smaller_than_the_devices_has_the_templates_gradients() -> None:
    # With BatchNormalization: a replica on no rows at all would turn every gradient into NaN.
    model = convolutional(batch_norm=True)
    weights = model.get_weights()
    parallel = parallel_of(model)
    for graph in (False, True):
        found = loss_and_gradients(parallel, images(1), graph)
        moved = model.get_weights()
        model.set_weights(weights)
        expected = loss_and_gradients(model, images(1), graph)
        assert_close(found, expected)
        assert_close(moved, model.get_weights())
        model.set_weights(weights)


@check(2)
def second_derivatives_equal_the_templates() -> None:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3, activation="tanh")(layers.Dense(5, activation="tanh")(inputs)))
    x = tf.constant(np.random.default_rng(0).random((7, 4), dtype="float32"))

    def penalty(of: Any) -> Any:
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                total = tf.reduce_sum(of(x) ** 2)
            loss = tf.reduce_sum(inner.gradient(total, x) ** 2)
        return outer.gradient(loss, of.trainable_variables)

    assert_close(penalty(parallel_of(model)), penalty(model))


@check(2)
def training_gives_the_templates_weights() -> None:
    model = convolutional()
    single = keras.models.clone_model(model)
    single.set_weights(model.get_weights())
    x, y = images(50), np.eye(5, dtype="float32")[np.arange(50) % 5]
    histories = []
    for trained in (parallel_of(model), single):
        trained.compile(loss="categorical_crossentropy", optimizer=keras.optimizers.Adam(0.01), metrics=["accuracy"])
        history = trained.fit(x, y, epochs=2, batch_size=25, shuffle=False, verbose=0)
        histories.append(history.history)
    assert_close(model.get_weights(), single.get_weights(), 1e-4)
    assert_close(histories[0], histories[1], 1e-4)


# ---- where things run


@check(2, 4)
def every_replica_runs_both_passes_on_its_own_device() -> None:
    from hpcutils.models.replication import placement

    found = placement(parallel_of(convolutional(batch_norm=True)), images(9), training=True)
    assert set(found) == {f"/device:CPU:{i}" for i in range(COUNT)}
    for device, names in found.items():
        own = f"replica_{device.rsplit(':', 1)[1]}"
        of_replicas = [name for name in names if "replica_" in name]
        assert of_replicas and all(f"{own}/" in name or f"{own}_gradient/" in name for name in of_replicas), of_replicas
        backward = [name for name in of_replicas if "Conv2DBackpropFilter" in name]
        assert len([name for name in names if "/conv2d" in name and own in name]) > 1 and backward, names


@check(2)
def a_model_that_is_not_replicated_runs_on_one_device() -> None:
    from hpcutils.models.replication import placement

    assert list(placement(convolutional(), images(9), training=True)) == ["/device:CPU:0"]


@check(2)
def outputs_are_joined_where_it_was_asked_for() -> None:
    from hpcutils.models.replication import placement

    for cpu_merge, device in ((True, "/device:CPU:0"), (False, "/device:CPU:1")):
        found = placement(parallel_of(convolutional(), gpus=[1, 0], cpu_merge=cpu_merge), images(8))
        assert [d for d, names in found.items() if any("join/concat" in name for name in names)] == [device]


@check(2)
def relocation_moves_the_weights_and_keeps_them_shared() -> None:
    with tf.device("/device:CPU:1"):
        model = convolutional(batch_norm=True)
    assert all(v.value.device.endswith("CPU:1") for v in model.variables)
    before, expected = [id(v) for v in model.variables], model.predict(images(6), verbose=0)
    parallel = parallel_of(model, cpu_relocation=True)
    assert all(v.value.device.endswith("CPU:0") for v in model.variables)
    assert [id(v) for v in parallel.variables] == before
    assert_close(parallel.predict(images(6), verbose=0), expected)
    parallel.layers[-1].bias.assign(np.arange(5.0))
    assert_close(parallel.predict(images(6), verbose=0), model.predict(images(6), verbose=0))
    assert np.abs(model.predict(images(6), verbose=0) - expected).max() > 0.1


# ---- the same model from outside


@check(2)
def it_has_the_templates_names_layers_and_variables() -> None:
    model = two_headed()
    parallel = parallel_of(model)
    assert parallel.output_names == model.output_names == ["kind", "price"]
    assert [t.name for t in parallel.inputs] == [t.name for t in model.inputs]
    assert [t.shape for t in parallel.outputs] == [t.shape for t in model.outputs]
    assert [id(v) for v in parallel.weights] == [id(v) for v in model.weights]
    assert [id(v) for v in parallel.trainable_variables] == [id(v) for v in model.trainable_variables]
    assert parallel.layers == model.layers and parallel.template is model
    model.get_layer("trunk").trainable = False
    assert len(parallel.trainable_weights) == len(model.trainable_weights) == 4


def two_headed() -> Any:
    wide, deep = keras.Input((3,), name="wide"), keras.Input((4,), name="deep")
    trunk = layers.Dense(6, activation="relu", name="trunk")(layers.Concatenate()([wide, deep]))
    price = layers.Dense(1, name="price")(trunk)
    kind = layers.Dense(2, activation="softmax", name="kind")(trunk)
    return keras.Model({"wide": wide, "deep": deep}, {"price": price, "kind": kind})


@check(2)
def dict_inputs_and_losses_by_output_name_train() -> None:
    model = two_headed()
    rng = np.random.default_rng(1)
    x = {"wide": rng.random((11, 3), "float32"), "deep": rng.random((11, 4), "float32")}
    y = {"price": rng.random((11, 1), "float32"), "kind": np.eye(2, dtype="float32")[np.arange(11) % 2]}
    results = []
    for trained in (parallel_of(model), model):
        trained.compile(
            optimizer="sgd",
            loss={"price": "mse", "kind": "categorical_crossentropy"},
            loss_weights={"price": 2.0, "kind": 0.5},
            metrics={"kind": ["accuracy"]},
        )
        results.append(trained.evaluate(x, y, verbose=0, return_dict=True))
        assert set(trained.predict(x, verbose=0)) == {"price", "kind"}
    assert_close(results[0], results[1])
    assert {"price_loss", "kind_loss", "kind_accuracy"} <= set(results[0])
    assert_same_gradients(model, x)


@check(2)
def sequential_models_work() -> None:
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4, activation="relu"), layers.Dense(2)])
    x = np.random.default_rng(2).random((COUNT * 3 + 1, 6), dtype="float32")
    assert_close(parallel_of(model)(x), model(x))
    assert_same_gradients(model, x)


@check(2)
def siamese_and_nested_models_work() -> None:
    inner_in = keras.Input((5, 5, 1))
    inner = keras.Model(inner_in, layers.Flatten()(layers.Conv2D(2, 2)(inner_in)), name="inner")
    encoder = keras.Sequential([keras.Input((5, 5, 1)), inner, layers.Dense(3)], name="encoder")
    left, right = keras.Input((5, 5, 1)), keras.Input((5, 5, 1))
    a, b = encoder(left), encoder(right)
    model = keras.Model([left, right], [layers.Subtract()([a, b]), layers.Dot(axes=1)([a, b])])
    rng = np.random.default_rng(3)
    x = [rng.random((7, 5, 5, 1), "float32") for _ in range(2)]
    assert_close(parallel_of(model)(x), model(x))
    assert_same_gradients(model, x)


@check(2)
def embeddings_and_masks_work() -> None:
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, 4, mask_zero=True)(tokens)
    model = keras.Model(tokens, layers.Dense(3)(x))
    rng = np.random.default_rng(4)
    ids = rng.integers(0, 20, (9, 6)).astype("int32")
    ids[:, 3:] = 0
    y = rng.random((9, 6, 3), "float32")
    losses = []
    for scored in (parallel_of(model), model):
        scored.compile(loss="mse", optimizer="sgd")
        losses.append(scored.evaluate(ids, y, batch_size=9, verbose=0))
    # Without the mask the loss would also count the padding.
    assert_close(losses[0], losses[1])
    unmasked = float(np.mean((model.predict(ids, verbose=0) - y) ** 2))
    assert abs(losses[0] - unmasked) > 1e-4
    assert_same_gradients(model, tf.constant(ids))


@check(2)
def recurrent_layers_work() -> None:
    inputs = keras.Input((4, 3))
    model = keras.Model(inputs, layers.LSTM(2, dropout=0.5)(layers.Masking()(inputs)))
    x = np.random.default_rng(10).random((5, 4, 3), dtype="float32")
    x[:, 3:] = 0
    parallel = parallel_of(model)
    expected, found = (loss_and_gradients(m, x, graph=True, training=False) for m in (model, parallel))
    assert_close(found, expected)
    assert (as_arrays(parallel(x, training=True)) != as_arrays(model(x))).any()


@check(2)
def sparse_and_optional_inputs_work() -> None:
    rows = np.eye(COUNT + 2, 4, dtype="float32")
    given = keras.Input((4,), sparse=True)
    model = keras.Model(given, layers.Dense(3)(given))
    sparse = tf.sparse.from_dense(rows)
    assert_close(parallel_of(model)(sparse), model(sparse))

    class Maybe(layers.Layer):
        def call(self, x: Any, extra: Any = None) -> Any:
            return x if extra is None else x + extra

        def compute_output_shape(self, x_shape: Any, extra_shape: Any = None) -> Any:
            return x_shape

    a, b = keras.Input((4,)), keras.Input((4,), optional=True)
    model = keras.Model([a, b], Maybe()(a, b))
    parallel = parallel_of(model)
    assert_close(parallel([rows, None]), rows)
    assert_close(parallel([rows, rows]), 2 * rows)


@check(2)
def mixed_precision_keeps_float32_weights() -> None:
    inputs = keras.Input((8,))
    hidden = layers.Dense(16, activation="relu", dtype="mixed_bfloat16")(inputs)
    model = keras.Model(inputs, layers.Dense(4, dtype="float32")(hidden))
    x = np.random.default_rng(5).random((10, 8), dtype="float32")
    parallel = parallel_of(model)
    assert_close(parallel(x), model(x))
    _, gradients = loss_and_gradients(parallel, x, graph=True)
    assert {g.dtype for g in gradients} == {tf.float32}
    assert_close(gradients, loss_and_gradients(model, x, graph=True)[1], 2e-2)


# ---- state, losses, randomness


@check(2)
def losses_of_layers_count_once() -> None:
    class MeanLoss(layers.Layer):
        def call(self, x: Any) -> Any:
            self.add_loss(keras.ops.mean(x))
            self.add_loss(keras.ops.mean(x, axis=1))
            return x

    inputs = keras.Input((3,))
    x = MeanLoss()(layers.Dense(4, kernel_regularizer="l1", activity_regularizer="l2")(inputs))
    model = keras.Model(inputs, x)
    parallel = parallel_of(model)
    for rows in (13, 1):
        values = np.random.default_rng(rows).random((rows, 3), dtype="float32")
        sums = []
        for called in (model, parallel):
            called(values)
            assert len(called.losses) == 4
            sums.append([tf.reduce_sum(loss) for loss in called.losses])
        assert_close(sorted(as_arrays(sums[1])), sorted(as_arrays(sums[0])))


@check(2)
def moving_statistics_move_once_a_step() -> None:
    inputs = keras.Input((3,))
    norm = layers.BatchNormalization(momentum=0.75)
    model = keras.Model(inputs, norm(inputs))
    rows = 4 * COUNT + 1
    x = np.random.default_rng(6).normal(3.0, 2.0, (rows, 3)).astype("float32")
    parts = np.split(x, [4 * i for i in range(1, COUNT)])
    parallel = parallel_of(model)
    tf.function(lambda x: parallel(x, training=True))(x)
    # One step of momentum, with the mean of the whole batch and the mean of the parts' variances.
    assert_close(norm.moving_mean, 0.25 * x.mean(0))
    within = sum(len(part) * part.var(0) for part in parts) / rows
    assert_close(norm.moving_variance, 0.75 + 0.25 * within)
    parallel(x, training=False)
    assert_close(norm.moving_mean, 0.25 * x.mean(0))


@check(2)
def dropout_differs_between_replicas_steps_and_modes() -> None:
    inputs = keras.Input((64,))
    model = keras.Model(inputs, layers.Dropout(0.5)(inputs))
    parallel = parallel_of(model)
    x = np.ones((2 * COUNT, 64), "float32")
    step = tf.function(lambda x: parallel(x, training=True))
    drawn = [as_arrays(step(x)) for _ in range(2)]
    assert (drawn[0] == 0).any() and (drawn[0] != drawn[1]).any()
    of_replicas = drawn[0].reshape(COUNT, 2, 64)
    assert all((of_replicas[0] != other).any() for other in of_replicas[1:])
    seed = next(v for v in model.variables if "seed" in v.path)
    # Every replica of both steps drew once.
    assert int(as_arrays(seed)[1]) == 2 * COUNT
    assert_close(parallel(x, training=False), x)


@check(2)
def noise_from_the_global_seed_changes_from_step_to_step() -> None:
    class Noise(layers.Layer):
        def call(self, x: Any) -> Any:
            return x + keras.random.normal(keras.ops.shape(x))

    inputs = keras.Input((8,))
    parallel = parallel_of(keras.Model(inputs, Noise()(inputs)))
    step = tf.function(lambda x: parallel(x))
    x = np.zeros((COUNT, 8), "float32")
    first, second = as_arrays(step(x)), as_arrays(step(x))
    assert (first != second).all() and len(np.unique(first)) == first.size


@check(2)
def counters_pass_through_every_replica() -> None:
    class Counter(layers.Layer):
        def build(self, shape: Any) -> None:
            self.calls = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)

        def call(self, x: Any) -> Any:
            self.calls.assign(self.calls + 1)
            return x

    inputs = keras.Input((2,))
    counter = Counter()
    parallel = parallel_of(keras.Model(inputs, counter(inputs)))
    parallel(np.ones((COUNT, 2), "float32"))
    assert int(counter.calls.numpy()) == COUNT


@check(2)
def plain_tensorflow_variables_get_gradients() -> None:
    class Scale(layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.scale = tf.Variable(2.0)

        def call(self, x: Any) -> Any:
            return x * self.scale

    inputs = keras.Input((3,))
    layer = Scale()
    model = keras.Model(inputs, layer(inputs))
    x = tf.constant(np.random.default_rng(8).random((9, 3), dtype="float32"))

    def gradient(of: Any, graph: bool) -> Any:
        def step() -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(of(x) ** 2)
            return tape.gradient(loss, layer.scale)

        return (tf.function(step) if graph else step)()

    parallel = parallel_of(model)
    for graph in (False, True):
        assert_close(gradient(parallel, graph), gradient(model, graph))


@check(2)
def stateless_calls_use_the_values_that_they_are_given() -> None:
    model = convolutional()
    parallel = parallel_of(model)
    given = [tf.zeros(v.shape) for v in model.trainable_variables]
    outputs, _ = parallel.stateless_call(given, model.non_trainable_variables, images(5))
    assert_close(outputs, np.full((5, 5), 0.2))


# ---- compiling and saving


@check(2)
def eager_and_many_steps_a_call_train() -> None:
    y = np.eye(5, dtype="float32")[np.arange(20) % 5]
    for options in ({"run_eagerly": True}, {"steps_per_execution": 3}):
        model = convolutional(batch_norm=True)
        parallel = parallel_of(model)
        before = model.get_weights()
        parallel.compile(loss="categorical_crossentropy", optimizer="sgd", **options)
        parallel.fit(images(20), y, batch_size=8, verbose=0)
        after = model.get_weights()
        assert all(np.isfinite(w).all() for w in after)
        assert all((a != b).any() for a, b in zip(before, after, strict=True))


@check(2)
def xla_is_refused_because_it_would_use_one_device() -> None:
    from hpcutils.errors import RequestError

    parallel = parallel_of(convolutional())
    assert parallel.jit_compile is False
    parallel.compile(loss="mse", optimizer="sgd")
    assert parallel.jit_compile is False
    assert "jit_compile" in str(raised(RequestError, lambda: parallel.compile(loss="mse", jit_compile=True)))


@check(2)
def saving_writes_the_template() -> None:
    from hpcutils.log import LOGGER

    model = convolutional(batch_norm=True)
    parallel = parallel_of(model)
    parallel.compile(loss="mse", optimizer="sgd")
    notes: list[str] = []
    LOGGER.addFilter(lambda record: notes.append(record.getMessage()) or True)
    with tempfile.TemporaryDirectory() as folder:
        whole, weights = Path(folder, "m.keras"), Path(folder, "m.weights.h5")
        parallel.save(whole)
        parallel.save_weights(weights)
        checkpoint = keras.callbacks.ModelCheckpoint(Path(folder, "c.keras"))
        parallel.fit(images(8), np.zeros((8, 5), "float32"), verbose=0, callbacks=[checkpoint])
        trained = model.predict(images(4), verbose=0)
        assert_close(keras.saving.load_model(Path(folder, "c.keras")).predict(images(4), verbose=0), trained)
        loaded = keras.saving.load_model(whole)
        assert type(loaded) is type(model) and loaded.name == "small"
        untrained = loaded.predict(images(4), verbose=0)
        assert np.abs(untrained - trained).max() > 1e-6
        parallel.load_weights(weights)
        assert_close(model.predict(images(4), verbose=0), untrained)
    assert notes == ["save of a replicated model: the template 'small' is written"]


@check(2)
def saving_without_the_optimizer_and_by_keras_own_function() -> None:
    from hpcutils.errors import RequestError

    model = convolutional()
    model.compile("adam", keras.losses.MeanSquaredError())
    parallel = parallel_of(model)
    with tempfile.TemporaryDirectory() as folder:
        for include, found in ((True, "Adam"), (False, "NoneType")):
            parallel.save(Path(folder, "m.h5"), include_optimizer=include)
            assert type(getattr(keras.saving.load_model(Path(folder, "m.h5")), "optimizer", None)).__name__ == found
        parallel.save(Path(folder, "m.keras"), include_optimizer=False)
        assert_close(keras.saving.load_model(Path(folder, "m.keras"))(images(4)), model(images(4)))
        said = str(raised(RequestError, lambda: keras.saving.save_model(parallel, Path(folder, "n.keras"))))
        assert "its own save()" in said


@check(2)
def a_clone_is_an_ordinary_model_with_weights_of_its_own() -> None:
    parallel = parallel_of(convolutional())
    clone = keras.models.clone_model(parallel)
    assert type(clone) is keras.Model or type(clone).__name__ == "Functional"
    clone.set_weights(parallel.get_weights())
    assert_close(clone(images(5)), parallel(images(5)))
    assert {id(v) for v in clone.variables}.isdisjoint(id(v) for v in parallel.variables)


@check(2)
def its_configuration_is_the_templates_or_refused() -> None:
    from hpcutils.errors import RequestError

    model = convolutional()
    parallel = parallel_of(model)
    assert parallel.to_json() == model.to_json()
    assert "template" in str(raised(RequestError, parallel.get_config))


# ---- the page's examples


@check(2, 4)
def the_pages_first_example() -> None:
    with tf.device("/cpu:0"):
        model = convolutional()
    parallel_model = parallel_of(model, gpus=COUNT)
    parallel_model.compile(loss="categorical_crossentropy", optimizer="rmsprop")
    x, y = images(40), np.random.default_rng(0).random((40, 5))
    before = model.get_weights()
    parallel_model.fit(x, y, epochs=2, batch_size=16, verbose=0)
    assert any((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "my_model.h5"))
        loaded = keras.saving.load_model(Path(folder, "my_model.h5"))
        assert_close(loaded.predict(x, verbose=0), parallel_model.predict(x, verbose=0))


@check(2)
def the_pages_second_and_third_example() -> None:
    for option in ({"cpu_relocation": True}, {"cpu_merge": False}):
        model = convolutional()
        try:
            parallel_model = parallel_of(model, **option)
        except ValueError:
            parallel_model = model
        assert parallel_model is not model and len(parallel_model.plan.devices) == COUNT
        parallel_model.compile(loss="categorical_crossentropy", optimizer="rmsprop")
        parallel_model.fit(images(8), np.eye(5)[np.arange(8) % 5], verbose=0)


@check(2)
def the_references_example() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "multi_gpu_model.md"
    # The first block splits the CPU, as this process did at its start.
    split, train, show = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8").split("## Example")[1], re.DOTALL)[:3]
    assert "set_logical_device_configuration" in split
    scope: dict[str, Any] = {}
    shown = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(shown):
        exec(train + show, scope)
        assert Path("model.keras").exists()
    assert scope["parallel_model"] is not scope["model"]
    lines = [line for line in shown.getvalue().splitlines() if line.startswith("/device:")]
    assert len(lines) == COUNT and all("Conv2DBackpropFilter" in line for line in lines)


@check(2)
def xception_is_replicated() -> None:
    model = keras.applications.Xception(weights=None, input_shape=(71, 71, 3), classes=10)
    x = np.random.default_rng(9).random((3, 71, 71, 3), dtype="float32")
    assert_close(tf.function(parallel_of(model))(x), tf.function(model)(x))


# ---- what is refused


@check(2)
def wrong_devices_are_refused_with_what_there_is() -> None:
    from hpcutils.models.replication import replicate

    model = convolutional()
    for gpus in (0, 1, -1, COUNT + 1, [0], [0, 0], [0, COUNT], [-1, 0], [], "2", 2.0, True, [0, 1.0]):
        assert f"gpus={gpus!r}" in str(raised(ValueError, lambda gpus=gpus: parallel_of(model, gpus=gpus)))
    assert "/device:CPU:1" in str(raised(ValueError, lambda: parallel_of(model, gpus=COUNT + 1)))
    for devices in ([], ["/GPU:0", "/CPU:0"], ["CPU:0", "/device:CPU:0"], ["nonsense::"], [f"CPU:{COUNT}", "CPU:0"]):
        raised(ValueError, lambda devices=devices: replicate(model, devices))


@check(2)
def numpy_counts_and_ids_in_any_order_are_accepted() -> None:
    model = convolutional()
    assert len(parallel_of(model, gpus=np.int64(2)).plan.devices) == 2
    assert parallel_of(model, gpus=(1, 0)).plan.devices == ("/device:CPU:1", "/device:CPU:0")
    assert_close(parallel_of(model, gpus=[1, 0])(images(5)), model(images(5)))


@check(2)
def named_devices_are_replicated_and_one_is_the_template() -> None:
    from hpcutils.models.replication import replicate

    model = convolutional()
    assert replicate(model, ["/CPU:1"]) is model
    named = replicate(model, ["/CPU:0", "cpu:1"])
    assert named.plan.devices == ("/device:CPU:0", "/device:CPU:1")
    assert_close(named(images(5)), model(images(5)))


@check(2)
def models_without_a_graph_are_refused() -> None:
    from hpcutils.errors import RequestError

    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x: Any) -> Any:
            return self.dense(x)

    own = Own()
    own(np.ones((2, 3), "float32"))
    assert "keras.Input" in str(raised(RequestError, lambda: parallel_of(own)))
    assert "keras.Input" in str(raised(RequestError, lambda: parallel_of(keras.Sequential([layers.Dense(2)]))))
    # What the hint says works.
    inputs = keras.Input((3,))
    model = keras.Model(inputs, own(inputs))
    x = np.random.default_rng(0).random((7, 3), dtype="float32")
    assert_close(parallel_of(model)(x), own(x))


@check(2)
def weights_outside_the_graph_are_refused() -> None:
    from hpcutils.errors import RequestError

    class Extra(keras.Model):
        def __init__(self) -> None:
            inputs = keras.Input((3,))
            super().__init__(inputs=inputs, outputs=layers.Dense(2)(inputs))
            self.aside = layers.Dense(1)
            self.aside.build((None, 3))

    assert "4 variables and its graph 2" in str(raised(RequestError, lambda: parallel_of(Extra())))


def raised(kind: type[Exception], call: Callable[[], Any]) -> Exception:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} was raised")


if __name__ == "__main__":
    main()
