"""What each MPI rank of `test_mean_gradient.py` runs: one SGD step on the last batch of an epoch, then a whole epoch.

    [mpirun -n RANKS] python mean_ranks.py FILE KIND SAMPLES,BATCH …

Rank 0 prints the weights after the step and the metrics of the epoch, a list for each case, as JSON. A rank alone prints also the
weights that plain Keras makes of the same rows.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import keras
import numpy as np

from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.order import Certificate, Order
from hpcutils.data.state import state_at
from hpcutils.data.windows import layout_of
from hpcutils.specs.job import read_job
from hpcutils.train.checkpoint import Progress
from hpcutils.train.distribute import connect
from hpcutils.train.feed import RowFeed
from hpcutils.train.ranks import Ranks
from hpcutils.train.reading import open_source
from hpcutils.train.record import Tally
from hpcutils.train.session import prepare_model
from hpcutils.world import world_from_environment

STEPS, WORDS = 6, 11
LOSSES = {"dense": "mse", "masked": "sparse_categorical_crossentropy"}
METRICS = {"dense": ["mae"], "masked": ["sparse_categorical_accuracy"]}


def build(kind: str) -> Any:
    keras.utils.set_random_seed(3)
    if kind == "dense":
        return keras.Sequential(
            [keras.Input((STEPS,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Flatten(), keras.layers.Dense(1)]
        )
    layers = [keras.layers.Embedding(WORDS, 4, mask_zero=True), keras.layers.Dense(3, activation="softmax")]
    return keras.Sequential([keras.Input((STEPS,)), *layers])


def job_of(kind: str, batch: int) -> Any:
    training = {"epochs": 1, "batch_size": batch, "loss": LOSSES[kind], "metrics": METRICS[kind]}
    training["optimizer"] = {"name": "sgd", "learning_rate": 0.5}
    data = {"files": [{"path": "data.h5"}], "x": kind, "y": f"{kind}_y"}
    return read_job(json.dumps({"name": "mean", "data": data, "model": {"function": "model.py:build"}, "training": training}))


def step_of(path: str, kind: str, samples: int, batch: int, ranks: Ranks, reducer: Any) -> dict[str, list[float]]:
    job = job_of(kind, batch)
    x, y = (HDF5Matrix(path, name, 0, samples) for (name,) in job.data.datasets)
    source, plan = open_source(x, y, Order(layout_of(x), batch, seed=1), ranks, "window", 1)
    order = plan.order
    template = build(kind)
    model, _ = prepare_model(template, job, ["/device:CPU:0"], reducer)
    tally = Tally(model, model.train_step, RowFeed(source, order), ranks, 4)
    tally.begin(0, Progress(0, state_at(order, 0, order.steps - 1, "", Certificate())))
    tally.runner(None)
    found = {"ours": weights_of(template), "keras": by_keras(kind, x[:], y[:], order) if ranks.comm is None else []}
    model.reset_metrics()
    tally.begin(0)
    while tally.runner.done < order.steps:
        tally.runner(None)
    return found | {"metrics": [float(value) for value in tally.finish().values()]}


def by_keras(kind: str, x: Any, y: Any, order: Order) -> list[float]:
    model = build(kind)
    model.compile(keras.optimizers.SGD(0.5), LOSSES[kind])
    cut = order.epoch(0).cut(order.steps - 1)
    rows = cut.rows[: cut.real]
    model.train_on_batch(x[rows], y[rows])
    return weights_of(model)


def weights_of(model: Any) -> list[float]:
    return [float(value) for value in np.concatenate([weight.ravel() for weight in model.get_weights()])]


def main() -> None:
    path, kind, *cases = sys.argv[1:]
    ranks = Ranks(world_from_environment())
    reducer = connect(ranks)
    found = [step_of(path, kind, *map(int, case.split(",")), ranks, reducer) for case in cases]
    if ranks.world.rank == 0:
        print(json.dumps({name: [case[name] for case in found] for name in found[0]}))


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # noqa: BLE001 - a rank that only raised would hang in MPI_Finalize
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(3)
