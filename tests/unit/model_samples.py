"""Small models with fixed names, and the comparison with golden files, for the tests of `models`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import keras

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
L = keras.layers


def assert_golden(name: str, text: str) -> None:
    """Compare with `tests/golden/models/<name>`; HPCUTILS_UPDATE_GOLDEN=1 writes it instead, for a look at the diff."""
    file = GOLDEN / name
    if os.environ.get("HPCUTILS_UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def example_of(page: str) -> str:
    """The first Python example of a page of the reference."""
    text = (REFERENCE / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text.split("## Example")[1], re.DOTALL)[0]


def stack() -> Any:
    """A plain stack of layers."""
    return keras.Sequential(
        [
            keras.Input((32, 32, 3), name="image"),
            L.Conv2D(16, 3, activation="relu", name="conv"),
            L.BatchNormalization(name="norm"),
            L.MaxPooling2D(name="pool"),
            L.Flatten(name="flatten"),
            L.Dropout(0.5, name="dropout"),
            L.Dense(10, activation="softmax", name="digits"),
        ],
        name="stack",
    )


def encoder() -> Any:
    return keras.Sequential([keras.Input((16,), name="vector"), L.Dense(8, name="narrow"), L.Dense(4, name="code")], name="encoder")


def siamese() -> Any:
    """A shared nested model, two inputs, three outputs, an operation that is no layer, layers with long names."""
    left, right = keras.Input((16,), name="left"), keras.Input((16,), name="right")
    shared = encoder()
    a, b = shared(left), shared(right)
    difference = L.Subtract(name="difference_between_the_left_and_the_right_code")([a, b])
    joined = L.Concatenate(name="joined")([difference, L.Multiply(name="product")([a, b])])
    score = L.Dense(1, activation="sigmoid", name="score")(joined)
    sequence, hidden, cell = L.LSTM(3, return_sequences=True, return_state=True, name="memory")(
        L.Reshape((4, 2), name="steps")(joined)
    )
    last = L.Add(name="states")([hidden, cell])
    return keras.Model([left, right], [score, sequence, last], name="siamese")


def nested() -> Any:
    """A model in a model in a model, a wrapped model and a wrapped layer."""
    series, vector = keras.Input((5, 16), name="series"), keras.Input((16,), name="vector_in")
    codes = L.TimeDistributed(encoder(), name="each_step")(series)
    summary = L.Bidirectional(L.LSTM(3, name="lstm"), name="both_ways")(codes)
    score = siamese()([vector, vector])[0]
    return keras.Model([series, vector], L.Concatenate(name="all")([summary, score]), name="nested")


class Subclassed(keras.Model):
    """A model that is no graph."""

    def __init__(self) -> None:
        super().__init__(name="subclassed")
        self.first = L.Dense(3, name="first")
        self.second = L.Dense(2, name="second")
        self.unused = L.Dense(1, name="unused")

    def call(self, x: Any) -> Any:
        return self.second(self.first(x))
