"""One model on several devices of one machine: `multi_gpu_model`, `replicate`, and the proof of who ran what.

TensorFlow and Keras are imported by the first call, not by this module.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from hpcutils.errors import DeviceError

MINIMUM = 2
HINT_SIMULATE = (
    "without GPUs, split the CPU before TensorFlow starts: tf.config.set_logical_device_configuration(cpu, [tf.config."
    "LogicalDeviceConfiguration()] * 2)"
)


def multi_gpu_model(
    model: Any, gpus: int | Sequence[int] | None = None, cpu_merge: bool = True, cpu_relocation: bool = False
) -> Any:
    """Replicate a Keras model on several devices of this machine.

    A batch is split into equal parts, the remainder to the last device; each device runs its part through the same
    weights; the outputs are joined in the batch's order. Compile and train the result, save `model`: they share every
    weight.

    Args:
        model: A functional or Sequential Keras model with known input shapes (the template). Build it under
            `tf.device("/cpu:0")` where the weights shall live in host memory.
        gpus: How many devices (2 or more), or a list of device ids. `None` takes all there are. On a machine without
            GPUs that was given several logical CPU devices, these are the devices.
        cpu_merge: Join the outputs on the CPU; otherwise on the first device.
        cpu_relocation: Move the weights to the CPU, where the model was not built there.

    Returns:
        A Keras model with the template's inputs, outputs, output names, layers and variables.

    Raises:
        DeviceError: Fewer than two devices, or one that is not there (also a `ValueError`).
        RequestError: The template is no graph of layers.

    Example:
        parallel = multi_gpu_model(model, gpus=2)
        parallel.compile(loss="categorical_crossentropy", optimizer="rmsprop")
        parallel.fit(x, y, batch_size=256)
        model.save("model.keras")
    """
    return replicate(model, choose(gpus, devices_here()), cpu_merge, cpu_relocation)


def replicate(model: Any, devices: Sequence[str], cpu_merge: bool = True, cpu_relocation: bool = False) -> Any:
    """Replicate a Keras model on devices given by name.

    Args:
        model: As for `multi_gpu_model`.
        devices: TensorFlow device names, such as `"/GPU:0"` or `"/device:CPU:1"`.
        cpu_merge: Join the outputs on the CPU; otherwise on the first device.
        cpu_relocation: Move the weights to the CPU.

    Returns:
        The replicated model; for one device the template itself.

    Raises:
        DeviceError: No device, one named twice, or one that is not there.
        RequestError: The template is no graph of layers.
    """
    names = resolve(devices)
    if cpu_relocation:
        move_to_cpu(model)
    if len(names) == 1:
        return model
    # Defines a keras.Model subclass, and so imports TensorFlow and Keras.
    from hpcutils.models.parallel import CPU, ParallelModel, Plan

    return ParallelModel(Plan(model, names, CPU if cpu_merge else names[0]))


def devices_here() -> list[str]:
    """Return the names of the devices to replicate on: all GPUs, or the logical CPUs where the CPU was split."""
    import tensorflow as tf

    gpus = [device.name for device in tf.config.list_logical_devices("GPU")]
    cpus = [device.name for device in tf.config.list_logical_devices("CPU")]
    return gpus or (cpus if len(cpus) > 1 else [])


def choose(gpus: int | Sequence[int] | None, available: Sequence[str]) -> list[str]:
    """Return the devices that `gpus` means, out of `available`.

    Raises:
        DeviceError: Fewer than two are asked for or there, an id is unknown or given twice.
    """
    there = f"this machine has {len(available)} to replicate on: {', '.join(available) or 'no GPU, and one CPU'}"
    hint = None if available else HINT_SIMULATE
    if gpus is None:
        ids = list(range(len(available)))
    elif isinstance(gpus, Sequence) and not isinstance(gpus, str):
        ids = [index(entry, gpus) for entry in gpus]
    else:
        ids = list(range(index(gpus, gpus)))
    asked = f"gpus={gpus!r}"
    if len(ids) < MINIMUM:
        raise DeviceError(f"{asked} gives {len(ids)} device(s), and replication needs {MINIMUM}; {there}", hint)
    if len(set(ids)) < len(ids):
        raise DeviceError(f"{asked} names a device twice", "give each device id once")
    if min(ids) < 0 or max(ids) >= len(available):
        raise DeviceError(f"{asked} asks for a device that is not there; {there}", hint)
    return [available[entry] for entry in ids]


def index(value: Any, gpus: Any) -> int:
    """Return `value` as an int; NumPy integers are, bools and floats are not.

    Raises:
        DeviceError: `value` is no integer.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise DeviceError(f"gpus={gpus!r}: a count or a list of integer ids was expected", "for example gpus=2 or [0, 1]")
    return operator.index(value)


def resolve(devices: Sequence[str]) -> tuple[str, ...]:
    """Return the full names of `devices`, in their order.

    Raises:
        DeviceError: None given, one given twice, or one that is not there.
    """
    import tensorflow as tf

    here = [device.name for device in tf.config.list_logical_devices()]
    names = tuple(short_name(device) for device in devices)
    missing = [name for name in names if name not in here]
    if missing or not names:
        asked = ", ".join(missing) or "no device"
        hint = None if any("GPU" in name for name in here) else HINT_SIMULATE
        raise DeviceError(f"{asked} was asked for; TensorFlow has {', '.join(here)}", hint)
    if len(set(names)) < len(names):
        raise DeviceError(f"a device is named twice: {', '.join(names)}", "give each device once")
    return names


def short_name(device: str) -> str:
    """Return `device` in the form `/device:GPU:0`.

    Raises:
        DeviceError: It is no device name.
    """
    import tensorflow as tf

    try:
        spec = tf.DeviceSpec.from_string(device)
    except ValueError as error:
        raise DeviceError(f"{device!r} is not a device name: {error}", "write it as /GPU:0 or /CPU:1") from error
    return f"/device:{(spec.device_type or '').upper()}:{spec.device_index or 0}"


def move_to_cpu(model: Any) -> None:
    """Move every variable of `model` that lives elsewhere to CPU 0; whoever holds the model keeps sharing it."""
    import tensorflow as tf

    away = [variable for variable in model.variables if not variable.value.device.endswith("/device:CPU:0")]
    for variable in away:
        with tf.device("/device:CPU:0"):
            # Keras has no public way to give a variable new storage. Cloning the model, as the old code did, would
            # leave the template with weights that are never trained.
            variable._initialize(tf.Variable(variable.value, trainable=variable.trainable, name=variable.name))
    if away:
        # Traced steps hold the old storage.
        model.train_function = model.test_function = model.predict_function = None


def placement(model: Any, x: Any, training: bool = False) -> dict[str, list[str]]:
    """Run `model` once and return which device ran which operations.

    The lists come from the graphs that TensorFlow's runtime cut for each device, after placement and optimisation, when
    it ran this very call: not from what the source asks for.

    Args:
        model: A Keras model.
        x: One batch of its inputs.
        training: Run in training mode and differentiate the sum of the outputs and losses too.

    Returns:
        Device name to the names of its operations, in the order of the graph. A replica's operations contain
        `replica_<i>/`, in the backward pass too; transfers, constants, arguments and results are left out.
    """
    # The public API can print placements to stderr, but not return them.
    from tensorflow.python.eager import context

    step = traced_step(model, training)
    context.enable_run_metadata()
    try:
        step(x)
        metadata = context.export_run_metadata()
    finally:
        context.disable_run_metadata()
    found: dict[str, list[str]] = {}
    for graph in (graph for function in metadata.function_graphs for graph in function.partition_graphs):
        for node in graph.node:
            if node.op not in {"_Send", "_Recv", "_Arg", "_Retval", "Const", "NoOp"}:
                found.setdefault(short_name(node.device), []).append(node.name)
    return found


def traced_step(model: Any, training: bool) -> Any:
    """Return a `tf.function` that runs `model`, and in training its gradient; fresh, or it would not be cut again."""
    import tensorflow as tf

    @tf.function  # type: ignore[untyped-decorator]
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            outputs = model(x, training=training)
            total = tf.add_n([tf.reduce_sum(part) for part in [*tf.nest.flatten(outputs), *model.losses]])
        return (outputs, tape.gradient(total, model.trainable_variables)) if training else outputs

    return step
