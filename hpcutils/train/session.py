"""The training itself, on one rank: data, model, optimizer, fit, and what came out.

TensorFlow and Keras are imported with this module: `train.main` has set the environment and the devices before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras

from hpcutils import fs
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.joined import JoinedMatrix, join
from hpcutils.data.order import Order
from hpcutils.data.quality import BADLY_MIXED, measure
from hpcutils.data.segments import Matrix, layout_of
from hpcutils.errors import HpcutilsError, JobFailedError, SpecError
from hpcutils.log import LOGGER
from hpcutils.models.custom_objects import CustomObjectScope
from hpcutils.models.plot import plot_model
from hpcutils.models.replication import replicate
from hpcutils.models.summary import print_summary
from hpcutils.rundir import RunDirectory
from hpcutils.specs.job import Job
from hpcutils.staging.items import Staged
from hpcutils.train.arrivals import Arrivals
from hpcutils.train.checkpoint import Progress, restore, save_model
from hpcutils.train.distribute import Reducer, connect, distribute_optimizer
from hpcutils.train.feed import Feed, RowFeed
from hpcutils.train.masks import count_over_ranks
from hpcutils.train.ranks import Ranks
from hpcutils.train.reading import ReadPlan, open_source
from hpcutils.train.record import Recorder, forget_epochs
from hpcutils.train.sequences import open_sequences
from hpcutils.train.steps import held_bytes
from hpcutils.train.usercode import load_function

Normalizer = Callable[[Any], Any]

# Labels larger than this (masks, pictures) are not looked at to see how well they mix.
MOST_LABEL_BYTES = 4096


def run(job: Job, run: RunDirectory, ranks: Ranks, arrivals: Arrivals, device_names: list[str]) -> dict[str, Any]:
    """Train; every rank returns the same outcome."""
    keras.utils.set_random_seed(job.training.seed)
    reducer = connect(ranks)
    with open_data(job, run, ranks, arrivals) as (training, validation), custom_objects(job, run.code):
        template = build_model(job, run.code)
        model, optimizer = prepare_model(template, job, device_names, reducer)
        # A shared file system may show a checkpoint to some ranks sooner than to others: rank 0's counts.
        progress = ranks.broadcast(restore(template, optimizer, run))
        data = name_data(job, arrivals.staged)
        first_step = go_on(progress, training, data)
        share_state(template, optimizer, reducer, ranks.world.rank)
        kept = forget_epochs(run, progress.epochs) if ranks.world.rank == 0 else []
        if ranks.world.rank == 0:
            describe(template, run)
            announce(job, ranks, len(device_names), reducer)

        recorder = Recorder(run, job, model, template, ranks, training, validation, data, progress, arrivals)
        if first_step:
            LOGGER.info("going on with step %d of epoch %d", first_step + 1, progress.epochs + 1)
            fit(model, training, validation, range(progress.epochs, progress.epochs + 1), recorder, first_step)
        fit(model, training, validation, range(progress.epochs + bool(first_step), job.training.epochs), recorder)
        # What was trained on must be proved before anything is called a result.
        arrivals.finish()
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


def fit(model: Any, training: Feed, validation: Feed | None, epochs: range, recorder: Recorder, first_step: int = 0) -> None:
    """Train `epochs`, each from `first_step` on."""
    if not epochs:
        return
    model.fit(
        training.dataset(first_step),
        validation_data=validation.dataset() if validation is not None else None,
        initial_epoch=epochs.start,
        epochs=epochs.stop,
        shuffle=False,
        verbose=0,
        callbacks=[recorder],
    )


def go_on(progress: Progress, training: Feed, data: str) -> int:
    """Return the step of the next epoch to go on with.

    Raises:
        DataError: The checkpoint is not of this data, seed or, in the middle of an epoch, batch size.
    """
    state, order = progress.state, training.order
    if state is None:
        return 0
    first_step = state.resume(order, data)
    if state.batch_size != order.batch_size:
        LOGGER.warning("from epoch %d on batches have %d samples; they had %d", state.epoch + 1, order.batch_size, state.batch_size)
    return first_step


def name_data(job: Job, staged: dict[str, Staged]) -> str:
    """Return what names the training data: a hash of its files' digests and of which part of them is used."""
    used = [job.data.sequence, job.data.args] if job.data.sequence is not None else [*job.data.datasets, job.data.split.train]
    facts = [sorted((name, file.sha256) for name, file in staged.items()), *used]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@contextmanager
def custom_objects(job: Job, code: Path) -> Iterator[None]:
    """Make the names in `model.custom_objects` known while the model is built, saved and loaded."""
    objects = {name: load_function(reference, code) for name, reference in job.model.custom_objects.items()}
    with CustomObjectScope(objects):
        yield


@contextmanager
def open_data(job: Job, run: RunDirectory, ranks: Ranks, arrivals: Arrivals) -> Iterator[tuple[Feed, Feed | None]]:
    """Yield this rank's training and held-out data; all ranks agree on both before the first step."""
    if job.data.sequence is not None:
        with open_sequences(job, run.code, ranks, arrivals.staged) as opened_sequences:
            yield opened_sequences
        return
    normalizer = load_function(job.data.normalizer, run.code) if job.data.normalizer is not None else None
    feeds: list[Feed] = []
    plans: list[ReadPlan] = []

    def opened(name: str, part: tuple[int, int | None], shuffle: bool) -> Feed:
        x, y = (ranks.together(lambda refs=refs: _open(job, arrivals, refs, part)) for refs in job.data.datasets)  # type: ignore[misc]
        order = Order(layout_of(x, y), job.training.batch_size, seed=job.training.seed, shuffle=shuffle)
        source, plan = open_source(x, y, order, ranks, job.data.read, job.training.epochs, arriving=arrivals.is_open)
        if ranks.world.rank == 0:
            LOGGER.info("%s: %d samples, %d steps of %d, read: %s", name, len(x), order.steps, order.batch_size, plan)
            look_at_mixing(order, y)
        plans.append(plan)
        feeds.append(RowFeed(source, plan.order, normalizer, job.data.classes))
        return feeds[-1]

    split = job.data.split
    training = opened("training data", split.train, shuffle=True)
    validation = opened("held-out data", split.validation, shuffle=False) if split.validation is not None else None
    if ranks.world.rank == 0:
        LOGGER.info("memory: %s", memory_of(plans, feeds))
    yield training, validation
    # Not in a `finally`: giving shared memory back is collective, and after an error the other ranks are not coming.
    for feed in feeds:
        feed.close()


def memory_of(plans: list[ReadPlan], feeds: list[Feed]) -> str:
    """Return what all data together takes: of a node, and of each rank beside that."""
    shared = sum(plan.memory_bytes for plan in plans)
    # One cache a process, whatever is read.
    ahead, cache = held_bytes(*feeds), max(plan.cache_bytes for plan in plans)
    return (
        f"{shared / 2**20:.1f} MiB of a node for data, and of each rank {ahead / 2**20:.1f} MiB for batches"
        f"{f', up to {cache / 2**20:.0f} MiB for chunks' if cache else ''}"
    )


def look_at_mixing(order: Order, labels: Matrix) -> None:
    """Log how well the order mixes; warn where the file is sorted by label, and of what becomes of that."""
    if not order.shuffle or labels.row_bytes > MOST_LABEL_BYTES or labels.dtype.kind not in "iufb":
        return
    quality = measure(order, labels.read_rows)
    LOGGER.info("shuffle: %s", quality)
    if quality.is_sorted:
        LOGGER.warning(
            "the samples are sorted by label: neighbours share theirs%s",
            "; windows mix them too little, write the file in random order" if quality.mixing > BADLY_MIXED else "",
        )


def _open(job: Job, arrivals: Arrivals, references: tuple[str, ...], part: tuple[int, int | None]) -> HDF5Matrix | JoinedMatrix:
    """Open a part of the datasets that `references` name, one after the other; those of files that arrive from their sources."""
    located = [job.data.locate(reference) for reference in references]
    paths = {file: str(arrivals.staged[file].path) for file, _ in located}
    sources = {paths[file]: arrivals.sources[file] for file in paths if file in arrivals.sources}
    open_matrix = HDF5Matrix.trusting if job.data.trust_files else HDF5Matrix

    def opened(path: str, dataset: str, start: int, end: int | None) -> HDF5Matrix:
        if path in sources:
            return HDF5Matrix.arriving(sources[path], path, dataset, start, end)
        return open_matrix(path, dataset, start, end)

    return join([(paths[file], dataset) for file, dataset in located], *part, opened)


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
    optimizer = distribute_optimizer(make_optimizer(job), reducer)
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
    count_over_ranks(model, reducer)
    optimizer.build(model.trainable_variables)
    return model, optimizer


def make_optimizer(job: Job) -> Any:
    """Return the optimizer that the job names.

    Raises:
        SpecError: Keras knows none of that name, or not with these arguments.
    """
    given = job.training.optimizer
    try:
        return optimizer_of(given)
    except (ValueError, TypeError) as exc:
        raise SpecError(f"training.optimizer: Keras makes none of {given!r}: {exc}", "see https://keras.io/api/optimizers") from exc


def optimizer_of(given: str | Mapping[str, Any]) -> Any:
    """Return the Keras optimizer of a name, or of a mapping with its `name` and arguments.

    Keras' own look-up by name has no Lamb, and takes an optimizer in an optimizer (`inner_optimizer`) only as it was saved.
    """
    config = {"name": given} if isinstance(given, str) else dict(given)
    name = str(config.pop("name"))
    inner = config.get("inner_optimizer")
    if isinstance(inner, str) or (isinstance(inner, Mapping) and "name" in inner):
        config["inner_optimizer"] = keras.optimizers.serialize(optimizer_of(inner))
    known: dict[str, Any] = {key.lower(): cls for key, cls in vars(keras.optimizers).items() if isinstance(cls, type)}
    cls = known.get(name.lower())
    return keras.optimizers.get({"class_name": name, "config": config}) if cls is None else cls.from_config(config)


def share_state(template: Any, optimizer: Any, reducer: Reducer | None, rank: int) -> None:
    """Give every rank rank 0's weights and optimizer state; random streams (dropout) stay different on purpose."""
    if reducer is None:
        return
    reducer.broadcast([variable.value for variable in (*template.variables, *optimizer.variables)])
    for variable in template.variables:
        if "seed_generator_state" in variable.path:
            variable.assign(variable + keras.ops.cast(rank, variable.dtype))


def announce(job: Job, ranks: Ranks, devices: int, reducer: Reducer | None) -> None:
    """Log what is about to run."""
    world = ranks.world
    LOGGER.info(
        "%s: %d ranks x %d devices, gradients by %s", job.name, world.world_size, devices, reducer.name if reducer else "none"
    )


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
