"""Self-test of a training image. Runs inside it and prints one JSON object as its last line.

Each check is a name, whether it holds, how long it took, and what was seen. The versions of all packages come with it.
"""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def imports(name):
    module = importlib.import_module(name)
    return f"{getattr(module, '__version__', '')} {module.__file__}".strip()


def packages_from_image():
    """No folder of the host may be on Python's path."""
    foreign = [path for path in sys.path if path and not path.startswith(("/usr/", "/opt/hpcutils-env/", "/hpcutils-src"))]
    assert not foreign, f"Python also looks in {foreign}"
    return f"{len(sys.path)} folders"


def parallel_hdf5():
    import h5py
    from mpi4py import MPI

    assert h5py.get_config().mpi, "h5py was built without MPI"
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/test.h5"
        with h5py.File(path, "w", driver="mpio", comm=MPI.COMM_WORLD) as file:
            data = file.create_dataset("x", (64,), "i4")
            with data.collective:
                data[:] = range(64)
        with h5py.File(path, "r", driver="mpio", comm=MPI.COMM_WORLD) as file:
            assert list(file["x"][:]) == list(range(64)), "what was written is not what was read"
    return f"HDF5 {h5py.version.hdf5_version}, {MPI.Get_library_version().split(',')[0]}"


def horovod_allreduce():
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()
    result = float(hvd.allreduce(tf.constant(3.0), op=hvd.Sum))
    assert result == 3.0 * hvd.size(), f"the sum over {hvd.size()} rank(s) of 3 was {result}"
    return f"size {hvd.size()}, MPI {'in' if hvd.mpi_built() else 'not in'}"


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
    ("parallel HDF5", parallel_hdf5),
    ("Horovod allreduce", horovod_allreduce),
    ("Keras backend", keras_backend),
    ("graphviz", graphviz),
    ("picture", model_picture),
    ("/dev/shm", shared_memory),
    ("locale", locale_is_utf8),
]


def perform(name, check):
    start = time.perf_counter()
    try:
        seen, ok = str(check()), True
    except (ArithmeticError, AssertionError, ImportError, OSError, RuntimeError, subprocess.SubprocessError, ValueError) as exc:
        seen, ok = f"{type(exc).__name__}: {exc}", False
    return {"check": name, "ok": ok, "seconds": round(time.perf_counter() - start, 3), "seen": seen}


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
    checks = [perform(name, check) for name, check in CHECKS]
    print(json.dumps({"checks": checks, "packages": packages, "python": sys.version.split()[0]}))
