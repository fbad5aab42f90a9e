"""A small convolutional network for 8 x 8 digits."""

import keras
from keras import layers


def scale(batch):
    """Bring pixels of 0 to 16 to 0 to 1: (rows, 8, 8, 1) uint8 to float32."""
    return batch.astype("float32") / 16.0


def build(filters=32):
    """Return the model: (8, 8, 1) to 10 probabilities."""
    image = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(filters, 3, padding="same", activation="relu")(image)
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(2 * filters, 3, padding="same", activation="relu")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(64, activation="relu")(x)
    return keras.Model(image, layers.Dense(10, activation="softmax", name="digit")(x), name="digits")
