"""Digits in batches, moved by up to a pixel: other pictures in every epoch, and the same ones however many ranks there are."""

import math

import numpy as np

from hpcutils.utils import Sequence

HELD_OUT = 360


class Digits(Sequence):
    """Batches `(x, y)` of `rows` pictures each; the last one has what is left.

    Args:
        images: `(n, 8, 8)` float32.
        labels: `(n,)` integers.
        rows: Pictures of a batch.
        moves: Whether pictures are moved.
    """

    def __init__(self, images, labels, rows, moves):
        self.images, self.labels, self.rows, self.moves = images, labels, rows, moves
        self.epoch = 0

    def __len__(self):
        return math.ceil(len(self.images) / self.rows)

    def __getitem__(self, index):
        part = slice(index * self.rows, (index + 1) * self.rows)
        images = self.images[part]
        if self.moves:
            # From the epoch and the batch's number alone: no matter which worker of which rank makes it.
            draw = np.random.default_rng((self.epoch, index))
            images = np.stack([np.roll(image, draw.integers(-1, 2, 2), (0, 1)) for image in images])
        return images[..., None], self.labels[part]

    def on_epoch_end(self):
        self.epoch += 1


def training(files, rows):
    """Return the Sequence to train on; `files` are those of `data.files`, the other arguments are `data.args` of train.yaml."""
    images, labels = load(files["digits.npz"])
    return Digits(images[:-HELD_OUT], labels[:-HELD_OUT], rows, moves=True)


def held_out(files, rows):
    """Return the held-out Sequence."""
    images, labels = load(files["digits.npz"])
    return Digits(images[-HELD_OUT:], labels[-HELD_OUT:], rows, moves=False)


def load(path):
    """Return images `(n, 8, 8)` float32 from 0 to 1 and labels `(n,)`."""
    with np.load(path) as data:
        return data["images"].astype("float32") / 16, data["labels"]
