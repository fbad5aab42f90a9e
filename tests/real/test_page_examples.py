"""The old page's largest example as it stands there, smaller only in numbers: Xception on several devices, trained and saved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

START = """
import os

os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
"""

# What differs from the page: 1000 samples of 224 x 224, 1000 classes, 8 GPUs, 20 epochs in batches of 256.
EXAMPLE = """
import tensorflow as tf
from keras.applications import Xception
from hpcutils.utils import multi_gpu_model
import numpy as np

num_samples = 4
height = 71
width = 71
num_classes = 10

with tf.device('/cpu:0'):
    model = Xception(weights=None,
                     input_shape=(height, width, 3),
                     classes=num_classes)

parallel_model = multi_gpu_model(model, gpus=2)
parallel_model.compile(loss='categorical_crossentropy',
                       optimizer='rmsprop')

x = np.random.random((num_samples, height, width, 3))
y = np.random.random((num_samples, num_classes))

parallel_model.fit(x, y, epochs=1, batch_size=4)

model.save('my_model.h5')
"""

CHECK = """
import keras

loaded = keras.saving.load_model('my_model.h5')
np.testing.assert_allclose(loaded.predict(x, verbose=0), parallel_model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
print(loaded.count_params())
"""


def test_xception_on_two_devices(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", START + EXAMPLE + CHECK], cwd=tmp_path, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "20881970"  # Xception's weights but for 990 of its 1000 classes
