"""Self-test of a training image. Every rank runs it inside the image; rank 0 prints one JSON object as its last line.

Each check is a name, whether it holds on every rank, how long it took, and what was seen; the versions of all packages come
with them.

    HPCUTILS_TEST_FOLDER    a folder that all ranks see; without it they have to be on one node
    HPCUTILS_TEST_GPU       set where the image is tested on a node with GPUs: one must be seen then
"""

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# What a launcher says of the size of the world: MPI has to agree.
SIZE_VARIABLES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


class Alone:
    """A world of one, for an image whose MPI cannot be loaded: that is one of the checks, not the end of them."""

    rank, size = 0, 1

    def allgather(self, value):
        return [value]


def connect():
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return Alone()
    return MPI.COMM_WORLD


def imports(name):
    module = importlib.import_module(name)
    return f"{getattr(module, '__version__', '')} {module.__file__}".strip()


def packages_from_image():
    """No folder of the host may be on Python's path."""
    foreign = [path for path in sys.path if path and not path.startswith(("/usr/", "/opt/hpcutils-env/", "/hpcutils-src"))]
    assert not foreign, f"Python also looks in {foreign}"
    return f"{len(sys.path)} folders"


def ranks_find_each_other(world):
    said = {name: int(os.environ[name]) for name in SIZE_VARIABLES if name in os.environ}
    assert all(size == world.size for size in said.values()), f"MPI counts {world.size} ranks, the launcher says {said}"
    nodes = sorted(set(world.allgather(os.uname().nodename)))
    return f"{world.size} ranks on {len(nodes)} node(s), PMIx {os.environ.get('PMIX_VERSION', 'of the image')}"


def parallel_hdf5(world):
    """Every rank writes its part of one dataset and reads its neighbour's, collectively."""
    import h5py
    import numpy as np
    from mpi4py import MPI

    assert h5py.get_config().mpi, "h5py was built without MPI"
    given = os.environ.get("HPCUTILS_TEST_FOLDER")
    folder = world.bcast(tempfile.mkdtemp(dir=given) if world.rank == 0 else None)
    path = f"{folder}/test.h5"
    mine, next_one = slice(world.rank * 16, world.rank * 16 + 16), (world.rank + 1) % world.size
    with h5py.File(path, "w", driver="mpio", comm=world) as file:
        data = file.create_dataset("x", (16 * world.size,), "i4")
        with data.collective:
            data[mine] = np.arange(16, dtype="i4") + 100 * world.rank
    with h5py.File(path, "r", driver="mpio", comm=world) as file:
        found = np.empty(16, "i4")
        with file["x"].collective:
            # Only read_direct is collective for plain numbers: h5py's fast reader ignores the property.
            file["x"].read_direct(found, np.s_[next_one * 16 : next_one * 16 + 16])
    world.Barrier()
    if world.rank == 0:
        shutil.rmtree(folder)
    assert list(found) == [100 * next_one + i for i in range(16)], "what was written is not what was read"
    return f"HDF5 {h5py.version.hdf5_version}, {MPI.Get_library_version().split(',')[0]}"


def horovod_allreduce(world):
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()
    assert hvd.size() == world.size, f"Horovod counts {hvd.size()} ranks, MPI {world.size}"
    result = float(hvd.allreduce(tf.constant(1.0 + hvd.rank()), op=hvd.Sum))
    expected = world.size * (world.size + 1) / 2
    assert result == expected, f"the sum over {world.size} rank(s) was {result}, not {expected}"
    return f"size {hvd.size()}, MPI {'in' if hvd.mpi_built() else 'not in'}, NCCL {'in' if hvd.nccl_built() else 'not in'}"


def gpu_is_seen():
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    assert found or "HPCUTILS_TEST_GPU" not in os.environ, "TensorFlow sees no GPU"
    return f"{len(found)} GPU(s)"


def keras_backend():
    import keras

    assert keras.backend.backend() == "tensorflow", f"the backend is {keras.backend.backend()}"
    return keras.__version__


def graphviz():
    done = subprocess.run(["dot", "-V"], capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).strip()


def model_picture():
    """graphviz with a font: without one the boxes are empty."""
    picture = subprocess.run(["dot", "-Tpng"], input=b"digraph { a -> b }", capture_output=True, check=True)
    assert picture.stdout.startswith(b"\x89PNG") and not picture.stderr, picture.stderr.decode()
    return f"{len(picture.stdout)} bytes"


def shared_memory():
    status = os.statvfs("/dev/shm")
    assert os.access("/dev/shm", os.W_OK), "/dev/shm cannot be written"
    return f"{status.f_frsize * status.f_blocks / 2**30:.1f} GiB"


def locale_is_utf8():
    import locale

    name = locale.setlocale(locale.LC_ALL, "")
    assert locale.getpreferredencoding().upper().replace("-", "") == "UTF8", f"{name} is not UTF-8"
    return name


MODULES = ("numpy", "h5py", "mpi4py", "tensorflow", "keras", "horovod", "horovod.tensorflow", "submitit", "pydot", "hpcutils")
CHECKS = [(f"import {name}", lambda name=name: imports(name)) for name in MODULES] + [
    ("packages come from the image", packages_from_image),
    ("Keras backend", keras_backend),
    ("GPU", gpu_is_seen),
    ("graphviz", graphviz),
    ("picture", model_picture),
    ("/dev/shm", shared_memory),
    ("locale", locale_is_utf8),
]
# A rank that failed before would let the others wait here.
TOGETHER = [("ranks", ranks_find_each_other), ("parallel HDF5", parallel_hdf5), ("Horovod allreduce", horovod_allreduce)]


def perform(name, check, world):
    start = time.perf_counter()
    try:
        seen, ok = str(check()), True
    except (ArithmeticError, AssertionError, ImportError, OSError, RuntimeError, subprocess.SubprocessError, ValueError) as exc:
        seen, ok = f"{type(exc).__name__}: {exc}", False
    results = world.allgather((ok, seen))
    failed = next((f"rank {rank}: {said}" for rank, (held, said) in enumerate(results) if not held), None)
    seconds = round(time.perf_counter() - start, 3)
    return {"check": name, "ok": failed is None, "seconds": seconds, "seen": failed or results[0][1]}


def all_checks(world):
    done = [perform(name, check, world) for name, check in CHECKS]
    for name, check in TOGETHER:
        if not all(row["ok"] for row in done):
            done.append({"check": name, "ok": False, "seconds": 0.0, "seen": "not tried: a check before it failed"})
        else:
            done.append(perform(name, lambda check=check: check(world), world))
    return done


def python_packages():
    return {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}


def debian_packages():
    query = ["dpkg-query", "--show", "--showformat", "${Package}=${Version}\n"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


if __name__ == "__main__":
    # Keras and fontconfig write to the home folder; here there is none.
    home = tempfile.TemporaryDirectory()
    os.environ["HOME"] = home.name
    # Packages first: importing setuptools adds copies of its own to the path.
    packages = {"python": python_packages(), "debian": debian_packages()}
    world = connect()
    checks = all_checks(world)
    if world.rank == 0:
        print(json.dumps({"checks": checks, "packages": packages, "python": sys.version.split()[0]}), flush=True)
