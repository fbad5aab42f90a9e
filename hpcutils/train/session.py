"""The training itself, on one rank: data, model, optimizer, fit, and what came out.

TensorFlow and Keras are imported with this module: `train.main` has set the environment and the devices before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras

from hpcutils import fs
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.node import NodeArray, check_same_length
from hpcutils.data.order import Order
from hpcutils.errors import DataError, HpcutilsError, JobFailedError, SpecError
from hpcutils.log import LOGGER
from hpcutils.models.custom_objects import CustomObjectScope
from hpcutils.models.plot import plot_model
from hpcutils.models.replication import replicate
from hpcutils.models.summary import print_summary
from hpcutils.rundir import RunDirectory
from hpcutils.specs.job import Job
from hpcutils.staging.stage import Staged
from hpcutils.train.checkpoint import restore, save_model
from hpcutils.train.distribute import Reducer, connect, distribute_optimizer
from hpcutils.train.feed import ShardedSequence
from hpcutils.train.ranks import Ranks
from hpcutils.train.record import Recorder, forget_epochs
from hpcutils.train.usercode import load_function

Normalizer = Callable[[Any], Any]


def run(job: Job, run: RunDirectory, ranks: Ranks, staged: dict[str, Staged], device_names: list[str]) -> dict[str, Any]:
    """Train; every rank returns the same outcome."""
    keras.utils.set_random_seed(job.training.seed)
    reducer = connect(ranks)
    with open_data(job, run, ranks, staged) as (training, validation), custom_objects(job, run.code):
        template = build_model(job, run.code)
        model, optimizer = prepare_model(template, job, device_names, reducer)
        done = restore(template, optimizer, run)
        share_state(template, optimizer, reducer, ranks.world.rank)
        kept = forget_epochs(run, done) if ranks.world.rank == 0 else []
        if ranks.world.rank == 0:
            describe(template, run)
            announce(job, ranks, training, len(device_names), reducer)

        recorder = Recorder(run, job, model, template, ranks, training, validation)
        model.fit(
            training,
            validation_data=validation,
            initial_epoch=done,
            epochs=job.training.epochs,
            shuffle=False,
            verbose=0,
            callbacks=[recorder],
        )
        digests = ranks.gather(digest := weights_digest(template))
        LOGGER.info("weights sha256 %s", digest)
        if ranks.world.rank == 0:
            save_model(template, run.model)
    if len(set(digests)) > 1:
        raise JobFailedError(f"the ranks ended with {len(set(digests))} different models", "report this with the run's job.json")
    history = kept + recorder.history
    last = ranks.broadcast(history[-1])
    return {
        "epochs": job.training.epochs,
        "metrics": {name: last[name] for name in last if name not in ("epoch", "coverage", "steps", "samples")},
        "accuracy": last.get("val_accuracy", last.get("accuracy")),
        "coverage": last["coverage"],
        "weights_sha256": digests[0],
        "weights_identical": True,
        "reducer": reducer.name if reducer is not None else "none",
        "devices": device_names,
    }


@contextmanager
def custom_objects(job: Job, code: Path) -> Iterator[None]:
    """Make the names in `model.custom_objects` known while the model is built, saved and loaded."""
    objects = {name: load_function(reference, code) for name, reference in job.model.custom_objects.items()}
    with CustomObjectScope(objects):
        yield


@contextmanager
def open_data(
    job: Job, run: RunDirectory, ranks: Ranks, staged: dict[str, Staged]
) -> Iterator[tuple[ShardedSequence, ShardedSequence | None]]:
    """Yield this rank's training and held-out data; all ranks agree on both before the first step."""
    normalizer = load_function(job.data.normalizer, run.code) if job.data.normalizer is not None else None
    open_arrays: list[NodeArray] = []

    def opened(part: tuple[int, int | None], shuffle: bool) -> ShardedSequence:
        x, y = (ranks.together(lambda ref=ref: _open(job, staged, ref, part)) for ref in (job.data.x, job.data.y))  # type: ignore[misc]
        arrays = [NodeArray(matrix, ranks.node_comm) for matrix in (x, y)]
        open_arrays.extend(arrays)
        check_same_length(*arrays)
        order = Order(len(x), job.training.batch_size, ranks.world.world_size, ranks.world.rank, job.training.seed, shuffle)
        _agree(order, arrays, ranks)
        return ShardedSequence(arrays[0], arrays[1], order, normalizer, job.data.classes)

    split = job.data.split
    training = opened(split.train, shuffle=True)
    validation = opened(split.validation, shuffle=False) if split.validation is not None else None
    yield training, validation
    # Not in a `finally`: freeing a window is collective, and after an error the other ranks are not coming.
    for array in open_arrays:
        array.close()


def _open(job: Job, staged: dict[str, Staged], reference: str, part: tuple[int, int | None]) -> HDF5Matrix:
    file, dataset = job.data.locate(reference)
    start, end = part
    return HDF5Matrix(str(staged[file].path), dataset, start, end)


def _agree(order: Order, arrays: list[NodeArray], ranks: Ranks) -> None:
    """Compare the plan over ranks: a disagreement is an error here, and would be a hang later."""
    plans = ranks.gather((order.digest(), [(array.shape, str(array.matrix.dtype)) for array in arrays]))
    for rank, plan in enumerate(plans):
        if plan != plans[0]:
            raise DataError(f"rank {rank} plans {plan}, rank 0 plans {plans[0]}", "the nodes do not see the same data")


def build_model(job: Job, code: Path) -> Any:
    """Call the user's function and return its Keras model.

    Raises:
        SpecError: It returned something else, or its arguments do not fit.
    """
    function = load_function(job.model.function, code)
    try:
        model = function(**job.model.args)
    except TypeError as exc:
        if exc.__traceback__ is not None and exc.__traceback__.tb_next is not None:
            raise  # inside the user's function, not in the call
        raise SpecError(f"model.args do not fit {job.model.function}: {exc}") from exc
    if not isinstance(model, keras.Model):
        raise SpecError(f"{job.model.function} returned {type(model).__name__}; a keras.Model was expected")
    if not model.built:
        raise SpecError(
            f"{job.model.function} returned a model without shapes",
            "start it with keras.Input, or call build() in the function",
        )
    return model


def prepare_model(template: Any, job: Job, device_names: list[str], reducer: Reducer | None) -> tuple[Any, Any]:
    """Replicate the model over this rank's devices and compile both with one optimizer.

    The template is compiled as well: it is what is saved, and its optimizer's state with it.
    """
    optimizer = make_optimizer(job)
    if reducer is not None:
        distribute_optimizer(optimizer, reducer)
    model = replicate(template, device_names)
    for target in dict.fromkeys((template, model)):
        # Weighted: padding rows have weight 0 and must not count. No XLA: Horovod's operations are not for it.
        target.compile(
            optimizer=optimizer,
            loss=job.training.loss,
            weighted_metrics=list(job.training.metrics),
            jit_compile=False,
            auto_scale_loss=False,
        )
    optimizer.build(model.trainable_variables)
    return model, optimizer


def make_optimizer(job: Job) -> Any:
    """Return the optimizer that the job names.

    Raises:
        SpecError: Keras knows none of that name, or not with these arguments.
    """
    given = job.training.optimizer
    config = {"name": given} if isinstance(given, str) else dict(given)
    name = config.pop("name")
    try:
        return keras.optimizers.get({"class_name": name, "config": config})
    except (ValueError, TypeError) as exc:
        raise SpecError(
            f"training.optimizer: Keras makes no {name!r} of {config}: {exc}", "see https://keras.io/api/optimizers"
        ) from exc


def share_state(template: Any, optimizer: Any, reducer: Reducer | None, rank: int) -> None:
    """Give every rank rank 0's weights and optimizer state; random streams (dropout) stay different on purpose."""
    if reducer is None:
        return
    reducer.broadcast([variable.value for variable in (*template.variables, *optimizer.variables)])
    for variable in template.variables:
        if "seed_generator_state" in variable.path:
            variable.assign(variable + keras.ops.cast(rank, variable.dtype))


def announce(job: Job, ranks: Ranks, training: ShardedSequence, devices: int, reducer: Reducer | None) -> None:
    """Log what is about to run."""
    order, world = training.order, ranks.world
    LOGGER.info(
        "%s: %d ranks x %d devices, gradients by %s", job.name, world.world_size, devices, reducer.name if reducer else "none"
    )
    LOGGER.info("%d samples, %d steps of %d an epoch, read by %s", order.samples, order.steps, order.batch_size, training.x.mode)


def describe(template: Any, run: RunDirectory) -> None:
    """Write the model's summary and picture. A picture that cannot be drawn is no reason to lose a job."""
    lines: list[str] = []
    print_summary(template, line_length=100, print_fn=lines.append)
    fs.write_text(run.summary, "\n".join(lines) + "\n")
    try:
        plot_model(template, to_file=str(run.picture), show_shapes=True, expand_nested=True)
    except HpcutilsError as exc:
        LOGGER.warning("no picture of the model: %s", exc)


def weights_digest(model: Any) -> str:
    """Return the sha256 over a model's weights, bit by bit."""
    state = hashlib.sha256()
    for value in model.get_weights():
        state.update(value.tobytes())
    return state.hexdigest()
