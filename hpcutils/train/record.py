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
from hpcutils.data.state import state_at
from hpcutils.errors import EXIT_REQUEUE, DataError
from hpcutils.log import LOGGER
from hpcutils.rundir import RunDirectory
from hpcutils.specs.job import Job
from hpcutils.train.arrivals import Arrivals
from hpcutils.train.checkpoint import Progress, save_checkpoint
from hpcutils.train.feed import Feed
from hpcutils.train.ranks import Ranks
from hpcutils.train.steps import StepRunner, steps_per_call
from hpcutils.train.stop import StoppedToGoOn

Values: TypeAlias = NDArray[np.float64]

# Seconds between two looks at whether to stop; an epoch shorter than that is run to its end.
LOOK_S = 10.0


class Tally:
    """Metrics of one pass over a feed, exact over all samples of all ranks.

    Keras counts every step alike, also the last, smaller global batch, whose samples weigh more so that its gradient is a true
    mean. What the metrics held before that last step is remembered; so its share can be put right.

    Args:
        model: The compiled model.
        step: Its `train_step` or `test_step`.
        feed: What it runs over.
        ranks: Who else runs.
        per_call: From `steps_per_call`.

    Attributes:
        runner: What runs the steps.
        epoch: Which one has begun; -1 before the first.
    """

    def __init__(self, model: Any, step: Callable[[Any], Any], feed: Feed, ranks: Ranks, per_call: int) -> None:
        self.model, self.feed, self.ranks = model, feed, ranks
        self.runner = StepRunner(step, feed, feed.order.steps, per_call, self._before_last_step, self._after_call)
        self._loss = next(metric for metric in model.metrics if metric.name == "loss")
        self._before: dict[int, Values] = {}
        self._expected = whole_certificate(feed.order.layout.samples, ranks)
        self.epoch = -1

    def begin(self, epoch: int, progress: Progress | None = None) -> None:
        """Start a pass, or go on with one in its middle: its first batches are made from now on. All ranks call it together."""
        self.runner.end()
        self.epoch = epoch
        state = progress.state if progress is not None else None
        first_step = state.consumed // state.batch_size if state is not None else 0
        self.feed.begin_epoch(epoch, first_step)
        self.runner.begin(first_step)
        self._before = {}
        self._seen_before = state.seen if state is not None else Certificate()
        self._sums_before = np.array(progress.sums) if progress is not None and progress.sums else np.zeros(())

    def _after_call(self, steps: int) -> None:
        for _ in range(steps):
            self.feed.used()

    def _before_last_step(self) -> None:
        self._before = {id(variable): values_of(variable) for variable in self.model.metrics_variables}

    def finish(self) -> dict[str, float]:
        """Return the metrics over all samples of all ranks, and check that each sample was seen once.

        Raises:
            DataError: The samples that the ranks took are not the dataset.
        """
        self._check_coverage()
        self.feed.end_epoch()
        loss, *states = self.sums()
        assign_flat(self._variables(), np.array(states))
        values = {name: float(value) for name, value in self.model.get_metrics_result().items()}
        return values | {"loss": loss / self.feed.order.samples}

    def sums(self) -> tuple[float, ...]:
        """Return the loss summed over the samples so far, and all states of metrics, over all ranks."""
        # States of metrics (sums, counts, confusion counts) add up over samples and ranks; their results do not.
        own = [np.array([self._loss_sum() / self.ranks.world.world_size]), *map(self._by_sample, self._variables())]
        return tuple((self.ranks.sum(flat(own)) + self._sums_before).tolist())

    def seen(self) -> Certificate:
        """Return the certificate of what the steps of all ranks have used in this epoch."""
        return self._seen_before.join(self.ranks.join(self.feed.certificate))

    def _variables(self) -> list[Any]:
        return [variable for variable in self.model.metrics_variables if variable.dtype.startswith("float")]

    def _parts(self, variable: Any) -> tuple[Values, Values]:
        """Return what full batches have added to a metric's state, and what the last one has."""
        after = values_of(variable)
        full = self._before.get(id(variable), after)
        return full, after - full

    def _by_sample(self, variable: Any) -> Values:
        """Return a metric's state with every sample counted as 1, whatever it weighed in its batch."""
        order, (full, last) = self.feed.order, self._parts(variable)
        return full / order.weight(0) + last / order.weight(order.steps - 1)

    def _loss_sum(self) -> float:
        """Return the loss summed over samples; each step's loss is the mean over ranks of what they saw."""
        order, (full, last) = self.feed.order, self._parts(self._loss.total)
        weight = float(self._loss.count) / (self.runner.done - self.feed.first_step)
        return float(full * order.batch_size + last * order.batch_samples(order.steps - 1)) / weight

    def _check_coverage(self) -> None:
        seen = self.seen()
        expected = self._expected
        if seen != expected:
            raise DataError(
                f"the ranks took {seen.count} {self.feed.order.items} of {expected.count}, and not each exactly once",
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
        data: What names the data, for checkpoints.
        progress: Where the run goes on.
        arrivals: Data that is still on its way, or `None`.
    """

    def __init__(
        self,
        run: RunDirectory,
        job: Job,
        model: Any,
        template: Any,
        ranks: Ranks,
        training: Feed,
        validation: Feed | None,
        data: str,
        progress: Progress,
        arrivals: Arrivals | None = None,
    ) -> None:
        super().__init__()
        self.run, self.job, self.template, self.ranks = run, job, template, ranks
        self.training, self.validation = training, validation
        self.data, self.progress, self.arrivals = data, progress, arrivals
        self.history: list[dict[str, Any]] = []
        per_call = steps_per_call(training, *([validation] if validation is not None else []))
        # A checkpoint lies between two calls.
        per_call = min(per_call, job.checkpoints.every_steps or per_call)
        self._train = Tally(model, model.train_step, training, ranks, per_call)
        # Before `fit` begins: it looks at both then.
        model.train_function, model.steps_per_execution = self._train.runner, per_call
        self._held_out = None
        if validation is not None:
            self._held_out = Tally(model, model.test_step, validation, ranks, per_call)
            model.test_function = self._held_out.runner

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._train.epoch != epoch:
            self._train.begin(epoch, self.progress if epoch == self.progress.epochs else None)
        if self._held_out is not None and self._held_out.epoch != epoch:
            self._held_out.begin(epoch)
        self._epoch, self._calls, self._next_look = epoch, 0, 1
        self._saved_step = self._train.runner.done
        self._values: dict[str, float] = {}
        self._started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._look_at_arrivals(self._train.runner.called)
        self._calls += 1
        step, every = self._train.runner.done, self.job.checkpoints.every_steps
        if every is not None and step // every > self._saved_step // every and step < self.training.order.steps:
            self._save_at(step)
        if self._calls == self._next_look:
            self._look_for_stop()

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._look_at_arrivals(0)

    def _look_at_arrivals(self, steps: int) -> None:
        """End the job with what ended the staging of its data, if anything did."""
        if self.arrivals is not None:
            self.arrivals.look(steps)

    def _look_for_stop(self) -> None:
        """Stop in the middle of a long epoch when that is asked for. Rank 0 looks, and says when to look again."""
        now_s = time.perf_counter() - self._started
        next_look = self._calls + min(max(1, int(LOOK_S * self._calls / now_s)), self._calls)
        asked = now_s > LOOK_S and self.ranks.world.rank == 0 and self.run.stop.exists()
        asked, self._next_look = self.ranks.broadcast((asked, next_look))
        step = self._train.runner.done
        if not asked or step >= self.training.order.steps:
            return
        if step != self._saved_step:
            self._save_at(step)
        self._stop(f"after step {step} of epoch {self._epoch + 1}")

    def _save_at(self, step: int) -> None:
        """Write a checkpoint in the middle of the epoch; all ranks call it together."""
        average_state(self.template, self.ranks)
        seen, sums = self._train.seen(), self._train.sums()
        if self.ranks.world.rank == 0:
            state = state_at(self.training.order, self._epoch, step, self.data, seen)
            save_checkpoint(self.template, self.run, state, self.job.checkpoints.keep, sums)
        self._saved_step = step

    def on_test_begin(self, logs: Any = None) -> None:
        # Keras clears the metrics right after this call.
        self._finish_training()

    def on_test_end(self, logs: Any = None) -> None:
        if self._held_out is not None:
            self._values |= {f"val_{name}": value for name, value in self._held_out.finish().items()}
            self._begin_next(self._held_out)

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
            order = self.training.order
            state = state_at(order, epoch, order.steps, self.data, Certificate())
            save_checkpoint(self.template, self.run, state, self.job.checkpoints.keep)
        if stop:
            self._stop(f"after epoch {done}")

    def _stop(self, when: str) -> None:
        LOGGER.warning("the time limit is near: stopping %s to be run again", when)
        # No thread may be inside of MPI when this process leaves it.
        for tally in (self._train, self._held_out):
            if tally is not None:
                tally.runner.end()
        if self.ranks.world.rank == 0:
            # Before the first rank goes: srun ends the others then, this one perhaps among them.
            fs.write_text(self.run.stopped, f"{when}\n")
        self.ranks.barrier()
        if self.arrivals is not None and self.arrivals.is_open:
            self.arrivals.leave(EXIT_REQUEUE)
        raise StoppedToGoOn()

    def _finish_training(self) -> None:
        seconds = time.perf_counter() - self._started
        self._values |= self._train.finish()
        average_state(self.template, self.ranks)
        order = self.training.order
        samples = order.samples - self.training.first_step * order.batch_size
        self._facts = {
            "samples": order.samples,
            "steps": order.steps,
            "coverage": "exact",
            "seconds": round(seconds, 4),
            "samples_per_s": round(samples / seconds, 1),
            **self._data_facts(self._epoch),
        }
        self._begin_next(self._train)

    def _begin_next(self, tally: Tally) -> None:
        """Let the first batches of a tally's next pass be made while something else goes on: held-out data, a checkpoint."""
        if self._epoch + 1 < self.job.training.epochs:
            tally.begin(self._epoch + 1)

    def _write(self, epoch: int) -> None:
        """Append the epoch's line, on rank 0."""
        line = {"epoch": epoch + 1, **self._values, **self._facts}
        self.history.append(line)
        if self.ranks.world.rank != 0:
            return
        with self.run.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        values = "  ".join(f"{name} {value:.4f}" for name, value in self._values.items())
        LOGGER.info(
            "epoch %d/%d  %s  %.0f samples/s  waited %.1f %%",
            *(epoch + 1, self.job.training.epochs, values, line["samples_per_s"]),
            100 * line["wait_s"] / line["seconds"],
        )

    def _data_facts(self, epoch: int) -> dict[str, Any]:
        """Return how data was read, how often its chunks were fetched over all ranks, and the longest wait of a rank for it."""
        training = self.training
        counts = [count for count in self.ranks.gather(training.chunks_read(epoch)) if count is not None]
        return {
            "read": training.mode,
            "chunks_read": round(sum(counts) / training.chunks, 4) if counts else None,
            "wait_s": round(max(self.ranks.gather(self._train.runner.wait_s)), 4),
        }


def whole_certificate(items: int, ranks: Ranks) -> Certificate:
    """Return the certificate of each item (sample, or batch of a Sequence) once; each rank works out a part of it."""
    rank, size = ranks.world.rank, ranks.world.world_size
    return ranks.join(certificate_of(items * (rank + 1) // size, items * rank // size))


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
