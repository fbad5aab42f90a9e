"""Optimizers as train.yaml names them."""

from __future__ import annotations

from pathlib import Path

import keras
import pytest
from fake_slurm import fake_slurm

from hpcutils.errors import SpecError
from hpcutils.specs.job import load_job
from hpcutils.train.session import make_optimizer


def optimizer(folder: Path, text: str):
    job = fake_slurm(folder).job
    with (job / "train.yaml").open("a") as file:
        file.write(f"  optimizer: {text}\n")
    return make_optimizer(load_job(job / "train.yaml"))


@pytest.mark.parametrize("name", ["adam", "AdamW", "SGD", "lamb", "Adafactor", "muon", "scheduleFreeAdamW", "ftrl"])
def test_every_optimizer_of_keras_by_name(tmp_path, name):
    assert type(optimizer(tmp_path, name)).__name__.lower() == name.lower()


def test_arguments_and_schedules(tmp_path):
    config = "{initial_learning_rate: 0.5, decay_steps: 10}"
    schedule = f"{{module: keras.optimizers.schedules, class_name: CosineDecay, registered_name: null, config: {config}}}"
    made = optimizer(tmp_path, f"{{name: sgd, momentum: 0.9, global_clipnorm: 2.0, learning_rate: {schedule}}}")
    assert (made.momentum, made.global_clipnorm, float(made.learning_rate)) == (0.9, 2.0, 0.5)


@pytest.mark.parametrize("inner", ["lamb", "{name: lamb, learning_rate: 0.25}"])
def test_an_optimizer_in_an_optimizer(tmp_path, inner):
    made = optimizer(tmp_path, f"{{name: LossScaleOptimizer, initial_scale: 64.0, inner_optimizer: {inner}}}")
    assert isinstance(made.inner_optimizer, keras.optimizers.Lamb)
    assert float(made.inner_optimizer.learning_rate) == pytest.approx(0.25 if "0.25" in inner else 0.001)


@pytest.mark.parametrize(
    "text", ["adma", "{name: adam, learning_rat: 1}", "{name: LossScaleOptimizer, inner_optimizer: {name: adma}}"]
)
def test_what_keras_does_not_know(tmp_path, text):
    with pytest.raises(SpecError, match=r"training\.optimizer: Keras makes none of"):
        optimizer(tmp_path, text)
