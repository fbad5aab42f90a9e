"""The devices of a rank: GPUs, or logical CPU devices in their place.

`prepare` runs before TensorFlow is imported (it reads the environment then), `configure` before its first operation.
"""

from __future__ import annotations

import os

from hpcutils.errors import DeviceError
from hpcutils.specs.job import Job
from hpcutils.world import World


def prepare(job: Job) -> None:
    """Set what TensorFlow reads from the environment while it is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if job.resources.devices == "simulated":
        # With oneDNN a convolution that is replicated over logical CPU devices dies: "input depth must be evenly divisible".
        os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def configure(job: Job, world: World, devices_per_rank: int) -> list[str]:
    """Claim this rank's devices and return their names, e.g. `['/device:CPU:0', '/device:CPU:1']`.

    Raises:
        DeviceError: The job asked for GPUs and this rank sees fewer.
    """
    import tensorflow as tf

    threads = job.resources.cpus_per_task
    # Ranks that each start a thread per core of the node would fight for the cores.
    tf.config.threading.set_intra_op_parallelism_threads(threads if world.local_size > 1 else max(threads, len(_cores())))
    if job.resources.devices == "simulated":
        return _simulated(devices_per_rank)
    return _gpus(world, devices_per_rank)


def _cores() -> set[int]:
    return os.sched_getaffinity(0)


def _simulated(count: int) -> list[str]:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    return [f"/device:CPU:{number}" for number in range(count)]


def _gpus(world: World, count: int) -> list[str]:
    import tensorflow as tf

    seen = tf.config.list_physical_devices("GPU")
    # Slurm shows a task all GPUs of its node unless it binds them one a task.
    first = world.local_rank * count if len(seen) >= world.local_size * count else 0
    mine = seen[first : first + count]
    if len(mine) < count:
        raise DeviceError(
            f"rank {world.rank} on {world.node} was to drive {count} GPUs and sees {len(seen)}",
            "check the image (a CUDA build?), 'nvidia-smi' on the node and CUDA_VISIBLE_DEVICES; "
            "'devices: simulated' trains on logical CPU devices instead",
        )
    tf.config.set_visible_devices(mine, "GPU")
    for gpu in mine:
        tf.config.experimental.set_memory_growth(gpu, True)
    return [f"/device:GPU:{number}" for number in range(count)]
