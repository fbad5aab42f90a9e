"""What each MPI rank of `test_optimizers.py` runs: every optimizer on half of each batch, beside plain Keras on the whole of it.

    mpirun -n 2 python optimizer_ranks.py

Prints one JSON object on rank 0: for each case how far the two are apart, how far the weights went, and whether all ranks agree.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from hpcutils.train.distribute import connect, distribute_optimizer
from hpcutils.train.ranks import Ranks
from hpcutils.train.record import average_state
from hpcutils.train.session import optimizer_of
from hpcutils.world import world_from_environment

STEPS, ROWS, WORDS = 6, 16, 4
SGD = {"learning_rate": 0.2}
ADAM = {"learning_rate": 0.02}
SCALED = {"inner_optimizer": {"name": "adam", **ADAM}, "initial_scale": 1024.0, "dynamic_growth_steps": 3}
# Case: the optimizer as train.yaml names it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("adam", ADAM),
    "adamw": ("adamw", ADAM | {"weight_decay": 0.1}),
    "sgd": ("sgd", SGD),
    "momentum": ("sgd", SGD | {"momentum": 0.9}),
    "nesterov": ("sgd", SGD | {"momentum": 0.9, "nesterov": True}),
    "rmsprop": ("rmsprop", ADAM),
    "lamb": ("lamb", ADAM),
    "adafactor": ("adafactor", ADAM),
    "accumulation": ("sgd", SGD | {"gradient_accumulation_steps": 3}),
    "ema": ("sgd", SGD | {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}),
    # Gradients of the halves point elsewhere than that of the whole: clipped before they are averaged, they would give another sum.
    "clipnorm": ("sgd", SGD | {"clipnorm": 0.05}),
    "global_clipnorm": ("sgd", SGD | {"global_clipnorm": 0.1}),
    "clipvalue": ("sgd", SGD | {"clipvalue": 0.01}),
    "loss_scale_factor": ("sgd", SGD | {"loss_scale_factor": 256.0}),
    "loss_scale": ("LossScaleOptimizer", SCALED),
    "loss_scale_clipped": (
        "LossScaleOptimizer",
        SCALED | {"inner_optimizer": {"name": "sgd", **SGD, "global_clipnorm": 0.1}},
    ),
}


def make_optimizer(case: str) -> Any:
    name, config = CASES[case]
    return optimizer_of({"name": name, **config})


def make_model(norm: bool = False, policy: str = "float32", one_hot: bool = False) -> Any:
    """Words to one number. The embedding's gradient is sparse (IndexedSlices); `one_hot` says the same with a dense one."""
    keras.utils.set_random_seed(3)
    words = keras.Input((WORDS,), dtype="int32")
    if one_hot:
        x = layers.Dense(5, use_bias=False, dtype=policy)(layers.Lambda(to_one_hot)(words))
    else:
        x = layers.Embedding(30, 5, dtype=policy)(words)
    x = layers.Flatten()(x)
    x = layers.BatchNormalization(dtype=policy)(x) if norm else x
    x = layers.Dense(8, activation="tanh", dtype=policy)(x)
    return keras.Model(words, layers.Dense(1, dtype="float32")(x))


def to_one_hot(words: Any) -> Any:
    """(rows, words) to (rows, words, 30)."""
    return keras.ops.one_hot(words, 30)


def batch(step: int, part: slice = slice(None)) -> tuple[Any, Any]:
    """A global batch of ROWS rows, or a part of it; its halves have very different targets."""
    random = np.random.RandomState(step)
    x, y = random.randint(0, 30, (ROWS, WORDS)), random.normal(0, 1, (ROWS, 1)).astype("float32")
    y[ROWS // 2 :] *= -4
    return x[part].astype("int32"), y[part]


def train(model: Any, optimizer: Any, part: slice = slice(None), spoil: int = -1) -> Any:
    """Train on a part of each batch; the one of step `spoil` overflows."""
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False, auto_scale_loss=False)
    optimizer.build(model.trainable_variables)
    for step in range(STEPS):
        x, y = batch(step, part)
        model.train_on_batch(x, y * np.float32("inf") if step == spoil else y)
    return model


def values(variables: list[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(keras.ops.convert_to_numpy(v), np.float64).ravel() for v in variables])


def main() -> dict[str, dict[str, Any]]:
    ranks = Ranks(world_from_environment())
    reducer = connect(ranks)
    assert reducer is not None
    rank, size = ranks.world.rank, ranks.world.world_size
    mine = slice(rank * ROWS // size, (rank + 1) * ROWS // size)

    def agree(array: np.ndarray) -> bool:
        return all(np.array_equal(array, other, equal_nan=True) for other in ranks.gather(array))

    def compared(case: str, norm: bool = False, policy: str = "float32", spoil: int = -1) -> dict[str, Any]:
        started = values(make_model(norm, policy).trainable_variables)
        optimizer = distribute_optimizer(make_optimizer(case), reducer)
        # Only rank 1's part overflows.
        model = train(make_model(norm, policy), optimizer, mine, spoil if rank == 1 else -1)
        weights = values(model.trainable_variables)
        single = make_model(norm, policy, one_hot=True)
        single.set_weights(make_model(norm, policy).get_weights())
        alone = values(train(single, make_optimizer(case), spoil=spoil).trainable_variables)
        average_state(model, ranks)
        return {
            "apart": float(np.abs(weights - alone).max()),
            "went": float(np.abs(weights - started).max()),
            "agree": agree(weights) and agree(values(optimizer.variables)),
            "state_agrees": agree(values(model.non_trainable_variables or [tf.zeros(1)])),
            "iterations": int(optimizer.iterations),
        }

    found = {case: compared(case) for case in CASES}
    found["overflow"] = compared("loss_scale", spoil=2)
    found["mixed_precision"] = compared("loss_scale", policy="mixed_float16")
    found["batch_norm"] = compared("adam", norm=True)
    found["world_of_one"] = {"apart": apart_alone()}
    found["untrainable"] = {"agree": untrainable(reducer)}
    ranks.barrier()
    return found if rank == 0 else {}


def apart_alone() -> float:
    """Return how far the sparse gradients of a world of one lead from the dense ones of plain Keras."""
    ours = train(make_model(), distribute_optimizer(make_optimizer("adam"), None))
    plain = make_model(one_hot=True)
    plain.set_weights(make_model().get_weights())
    train(plain, make_optimizer("adam"))
    return float(np.abs(values(ours.trainable_variables) - values(plain.trainable_variables)).max())


def untrainable(reducer: Any) -> bool:
    """Whether a model with nothing to train can be fitted, as in Keras."""
    model = keras.Sequential([keras.Input((1,)), layers.Rescaling(2.0)])
    model.compile(optimizer=distribute_optimizer(make_optimizer("sgd"), reducer), loss="mse", jit_compile=False)
    return bool(np.isfinite(model.train_on_batch(np.ones((2, 1)), np.ones((2, 1)))))


if __name__ == "__main__":
    try:
        results = main()
    except BaseException:  # noqa: BLE001 - the process boundary: the other rank must not wait for this one
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    if results:
        print(json.dumps(results))
