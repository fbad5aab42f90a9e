"""What an epoch measured, over all ranks: the callback that writes `metrics.jsonl`, proves coverage and saves checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import numpy as np
from numpy.typing import NDArray

from hpcutils import fs
from hpcutils.data.order import Certificate, certificate_of
from hpcutils.errors import EXIT_REQUEUE, DataError
from hpcutils.log import LOGGER
from hpcutils.rundir import RunDirectory
from hpcutils.specs.job import Job
from hpcutils.train.checkpoint import save_checkpoint
from hpcutils.train.feed import ShardedSequence
from hpcutils.train.ranks import Ranks
from hpcutils.train.steps import STEPS_PER_CALL, StepRunner

Values: TypeAlias = NDArray[np.float64]


class Tally:
    """Metrics of one pass over a sequence, exact over all samples of all ranks.

    Keras counts every step alike, also the last, smaller global batch, whose samples weigh more so that its gradient is a true
    mean. What the metrics held before that last step is remembered; so its share can be put right.

    Args:
        model: The compiled model.
        step: Its `train_step` or `test_step`.
        sequence: What it runs over.
        ranks: Who else runs.

    Attributes:
        runner: What runs the steps.
    """

    def __init__(self, model: Any, step: Callable[[Any], Any], sequence: ShardedSequence, ranks: Ranks) -> None:
        self.model, self.sequence, self.ranks = model, sequence, ranks
        self.runner = StepRunner(model, step, sequence.order.steps, self._before_last_step)
        self._loss = next(metric for metric in model.metrics if metric.name == "loss")
        self._before: dict[int, Values] = {}

    def begin(self, epoch: int) -> None:
        """Start a pass."""
        self.sequence.begin_epoch(epoch)
        self.runner.begin()
        self._before = {}

    def _before_last_step(self) -> None:
        self._before = {id(variable): values_of(variable) for variable in self.model.metrics_variables}

    def finish(self) -> dict[str, float]:
        """Return the metrics over all samples of all ranks, and check that each sample was seen once.

        Raises:
            DataError: The samples that the ranks took are not the dataset.
        """
        self._check_coverage()
        loss = self._true_mean_loss()
        variables = [variable for variable in self.model.metrics_variables if variable.dtype.startswith("float")]
        # States of metrics (sums, counts, confusion counts) add up over samples and ranks; their results do not.
        assign_flat(variables, self.ranks.sum(flat([self._by_sample(variable) for variable in variables])))
        values = {name: float(value) for name, value in self.model.get_metrics_result().items()}
        return values | {"loss": loss}

    def _by_sample(self, variable: Any) -> Values:
        """Return a metric's state with every sample counted as 1, whatever it weighed in its batch."""
        order, after = self.sequence.order, values_of(variable)
        before = self._before.get(id(variable), np.zeros_like(after))
        return before / order.weight(0) + (after - before) / order.weight(order.steps - 1)

    def _true_mean_loss(self) -> float:
        """Return the mean loss over samples; each step's loss is the mean over ranks of what they saw."""
        order = self.sequence.order
        last, after = order.batch_samples(order.steps - 1), float(self._loss.total)
        before = float(self._before.get(id(self._loss.total), np.zeros(())))
        weight = float(self._loss.count) / order.steps
        before, tail = self.ranks.sum(np.array([before, after - before]) / weight) / self.ranks.world.world_size
        return float(before * order.batch_size + tail * last) / order.samples

    def _check_coverage(self) -> None:
        seen = Certificate()
        for part in self.ranks.gather(self.sequence.certificate):
            seen = seen.join(part)
        expected = certificate_of(self.sequence.order.samples)
        if seen != expected:
            raise DataError(
                f"the ranks took {seen.count} samples of {expected.count}, and not each exactly once",
                "this is a fault of hpcutils: please report it with the run's job.json",
            )


class Recorder(keras.callbacks.Callback):  # type: ignore[misc]
    """Writes what every epoch measured, keeps checkpoints, and stops in order when Slurm's time is nearly up.

    Args:
        run: The run directory.
        job: The job.
        model: The compiled model that is trained; its steps are run by this recorder's tallies.
        template: The model to save.
        ranks: All ranks.
        training: The training data.
        validation: The held-out data, or `None`.
    """

    def __init__(
        self,
        run: RunDirectory,
        job: Job,
        model: Any,
        template: Any,
        ranks: Ranks,
        training: ShardedSequence,
        validation: ShardedSequence | None,
    ) -> None:
        super().__init__()
        self.run, self.job, self.template, self.ranks = run, job, template, ranks
        self.training, self.validation = training, validation
        self.history: list[dict[str, Any]] = []
        self._train = Tally(model, model.train_step, training, ranks)
        # Before `fit` begins: it looks at both then.
        model.train_function, model.steps_per_execution = self._train.runner, STEPS_PER_CALL
        self._held_out = None
        if validation is not None:
            self._held_out = Tally(model, model.test_step, validation, ranks)
            model.test_function = self._held_out.runner

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._train.begin(epoch)
        self._values: dict[str, float] = {}
        self._started = time.perf_counter()

    def on_test_begin(self, logs: Any = None) -> None:
        # Keras clears the metrics right after this call.
        self._finish_training()
        if self._held_out is not None:
            self._held_out.begin(0)

    def on_test_end(self, logs: Any = None) -> None:
        if self._held_out is not None:
            self._values |= {f"val_{name}": value for name, value in self._held_out.finish().items()}

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if not self._values:
            self._finish_training()
        if logs is not None:
            logs.update(self._values)
        self._write(epoch)
        done = epoch + 1
        # One rank looks: a shared file system may show the file to some ranks sooner than to others.
        asked = self.ranks.broadcast(self.ranks.world.rank == 0 and self.run.stop.exists())
        stop = asked and done < self.job.training.epochs
        if self.ranks.world.rank == 0 and (stop or done % self.job.checkpoints.every_epochs == 0):
            save_checkpoint(self.template, self.run, done, self.job.checkpoints.keep)
        if stop:
            LOGGER.warning("the time limit is near: stopping after epoch %d to be run again", done)
            if self.ranks.world.rank == 0:
                # Before the first rank goes: srun ends the others then, this one perhaps among them.
                fs.write_text(self.run.stopped, f"{done}\n")
            self.ranks.barrier()
            raise SystemExit(EXIT_REQUEUE)

    def _finish_training(self) -> None:
        self._seconds = time.perf_counter() - self._started
        self._values |= self._train.finish()
        average_state(self.template, self.ranks)

    def _write(self, epoch: int) -> None:
        """Append the epoch's line, on rank 0."""
        samples = self.training.order.samples
        line = {
            "epoch": epoch + 1,
            **self._values,
            "samples": samples,
            "steps": self.training.order.steps,
            "coverage": "exact",
            "seconds": round(self._seconds, 4),
            "samples_per_s": round(samples / self._seconds, 1),
        }
        self.history.append(line)
        if self.ranks.world.rank != 0:
            return
        with self.run.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        values = "  ".join(f"{name} {value:.4f}" for name, value in self._values.items())
        LOGGER.info("epoch %d/%d  %s  %.0f samples/s", epoch + 1, self.job.training.epochs, values, line["samples_per_s"])


def average_state(model: Any, ranks: Ranks) -> None:
    """Average what training changes without gradients (batch normalisation's moving statistics) over the ranks."""
    variables = [v for v in model.non_trainable_variables if v.dtype.startswith("float")]
    if ranks.comm is not None and variables:
        assign_flat(variables, ranks.sum(flat([values_of(v) for v in variables])) / ranks.world.world_size)


def values_of(variable: Any) -> Values:
    """Return a variable's values as float64."""
    return np.asarray(keras.ops.convert_to_numpy(variable), np.float64)


def flat(arrays: list[Values]) -> Values:
    """Return all values in one array `(n,)`."""
    return np.concatenate([array.ravel() for array in arrays])


def assign_flat(variables: list[Any], values: Values) -> None:
    """Give `values`, flattened as by `flat`, to the variables."""
    start = 0
    for variable in variables:
        size = int(np.prod(variable.shape))
        variable.assign(values[start : start + size].reshape(variable.shape).astype(variable.dtype))
        start += size


def forget_epochs(run: RunDirectory, done: int) -> list[dict[str, Any]]:
    """Drop the lines of epochs that a restart will run again; return those that stay."""
    if not run.metrics.is_file():
        return []
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    kept = [line for line in lines if line["epoch"] <= done]
    fs.write_text(run.metrics, "".join(json.dumps(line) + "\n" for line in kept))
    return kept
