"""What a careful person writes without hpcutils: Horovod, tf.data and a custom step, for the model and data of jobs/digits.

One rank a device; the data is in memory, a rank takes every world_size-th sample of a common shuffle, the last batch is dropped.
Nothing is staged, checked, recorded or validated. Prints one JSON line on rank 0.

    srun --mpi=pmix … python3 benchmarks/handwritten_horovod.py JOB_FOLDER EPOCHS GLOBAL_BATCH
"""

import json
import os
import resource
import sys
import time

os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
import h5py
import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

folder, epochs, global_batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path.insert(0, folder)
from model import build, scale  # noqa: E402 - the folder is known only now

hvd.init()
tf.config.threading.set_intra_op_parallelism_threads(1)
keras.utils.set_random_seed(7)
with h5py.File(f"{folder}/digits.h5") as file:
    x, y = scale(file["images"][:1437]), np.eye(10, dtype="float32")[file["labels"][:1437]]
local_batch = global_batch // hvd.size()
data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=7, reshuffle_each_iteration=True)
data = data.shard(hvd.size(), hvd.rank()).batch(local_batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)

model = build()
optimizer = keras.optimizers.Adam(0.003)
optimizer.build(model.trainable_variables)
loss_of = keras.losses.CategoricalCrossentropy()
accuracy = keras.metrics.CategoricalAccuracy()


@tf.function
def step(images, labels):
    with tf.GradientTape() as tape:
        predicted = model(images, training=True)
        loss = loss_of(labels, predicted)
    gradients = hvd.grouped_allreduce(tape.gradient(loss, model.trainable_variables), op=hvd.Average)
    optimizer.apply(gradients, model.trainable_variables)
    accuracy.update_state(labels, predicted)
    return loss


hvd.broadcast_variables([w.value for w in model.weights], root_rank=0)
seconds = []
for _ in range(epochs):
    start = time.perf_counter()
    for images, labels in data:
        loss = step(images, labels)
    float(loss)
    seconds.append(time.perf_counter() - start)
steps = len(x) // hvd.size() // local_batch
if hvd.rank() == 0:
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"epoch_s": seconds, "steps": steps, "peak_mb": peak_mb, "accuracy": float(accuracy.result())}))
