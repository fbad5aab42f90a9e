"""to_categorical and normalize beside Keras, scikit-learn and numpy idioms.

python -m benchmarks.bench_arrays [--json]
"""

from __future__ import annotations

import keras
import numpy as np
import sklearn.preprocessing

from benchmarks.harness import Ratio, compare, report
from hpcutils.data.arrays import normalize, to_categorical


def categorical() -> list[Ratio]:
    """Compare one-hot rows; scikit-learn's encoders get their classes ready-made."""
    rows = []
    for count, classes in ((10_000_000, 10), (1_000_000, 100), (100_000, 1000)):
        labels = np.random.default_rng(0).integers(0, classes, count)
        column = labels[:, None]
        encoder = sklearn.preprocessing.OneHotEncoder(categories=[np.arange(classes)], sparse_output=False, dtype=np.float32).fit(
            column[:classes]
        )
        rows += compare(
            f"to_categorical, {count} labels of {classes}",
            lambda labels=labels, classes=classes: to_categorical(labels, classes),
            {
                "keras": lambda labels=labels, classes=classes: keras.utils.to_categorical(labels, classes),
                "np.eye(C, dtype)[y]": lambda labels=labels, classes=classes: np.eye(classes, dtype="f4")[labels],
                "sklearn OneHotEncoder": lambda column=column, encoder=encoder: encoder.transform(column),
                "sklearn label_binarize": lambda labels=labels, classes=classes: sklearn.preprocessing.label_binarize(
                    labels, classes=np.arange(classes)
                ),
            },
            repeats=3,
        )
    return rows


def norms() -> list[Ratio]:
    """Compare unit vectors along the last and the first axis."""
    rows = []
    for shape, dtype, order in (
        ((200_000, 784), "f4", 2),
        ((100_000, 128), "f8", 2),
        ((200_000, 128), "f4", 1),
        ((64, 1000), "f4", 2),
    ):
        x = np.random.default_rng(0).random(shape).astype(dtype)
        name = {1: "l1", 2: "l2"}[order]
        for axis in (-1, 0):
            peers = {"sklearn": lambda x=x, axis=axis, name=name: sklearn.preprocessing.normalize(x, name, axis=axis % 2)}
            if axis == -1:  # Keras 3.15 takes axis 0 for -1 halfway, and fails
                peers["keras"] = lambda x=x, order=order: keras.utils.normalize(x, -1, order)
            case = f"normalize, {shape} {dtype}, order {order}, axis {axis}"
            rows += compare(case, lambda x=x, axis=axis, order=order: normalize(x, axis, order), peers, repeats=5)
    return rows


if __name__ == "__main__":
    report(categorical() + norms())
