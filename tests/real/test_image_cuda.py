"""Horovod for NVIDIA GPUs, compiled as the CUDA recipe says: with NCCL, against TensorFlow 2.18.1. Nothing runs on a GPU here."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, require
from test_image import as_user, home, own  # noqa: F401 - `home` is a fixture

from hpcutils.specs.recipe_file import locked

pytestmark = pytest.mark.apptainer

CONTAINERS = ROOT / "containers"
NAME = "tf-horovod-cuda"
# Runs in the image: it loads Horovod's library, which loads NCCL's; both do so without a driver.
SELF_TEST = """
import json, horovod.tensorflow as hvd, tensorflow as tf
seen = {"NCCL": hvd.nccl_built(), "MPI": hvd.mpi_built(), "CUDA": hvd.cuda_built(), "TensorFlow": tf.__version__ == "2.18.1"}
rows = [{"check": name, "ok": bool(value), "seconds": 0, "seen": str(value)} for name, value in seen.items()]
print(json.dumps({"checks": rows, "packages": {"python": {}, "debian": {}}, "python": "3.11"}))
"""


def recipe_of_the_compiled_part(folder: Path) -> Path:
    """The CUDA recipe without h5py, and without the 2 GB of NVIDIA's libraries that only running needs."""
    text = (CONTAINERS / f"recipes/{NAME}.toml").read_text().replace(f'name = "{NAME}"', 'name = "nccl-check"')
    h5py = re.search(r'\[\[compile\.packages\]\]\nname = "h5py".*?\n\n', text, re.DOTALL)
    assert h5py is not None
    text = (
        text.replace(h5py.group(), "").replace(f"../locks/{NAME}.txt", "packages.txt").replace("../selftests/training.py", "t.py")
    )
    text = text.replace("../locks", str(CONTAINERS / "locks")).replace("ranks = 2\n", "")
    (folder / "nccl-check.toml").write_text(text)
    entries = locked((CONTAINERS / f"locks/{NAME}.txt").read_text())
    kept = [entry for name, entry in entries.items() if not name.startswith("nvidia-") or name == "nvidia-nccl-cu12"]
    (folder / "packages.txt").write_text("".join(kept))
    (folder / "t.py").write_text(SELF_TEST)
    return folder / "nccl-check.toml"


def test_horovod_compiles_with_nccl_against_tensorflow_2_18(home: Path) -> None:  # noqa: F811
    """The wheel is kept in the user's cache under the digest of all that it depends on: minutes once, then a look at it."""
    require(os.geteuid() == 0, "root, to become an ordinary user")
    recipe = recipe_of_the_compiled_part(home)
    own(home)
    images = {"HPCUTILS_IMAGES": str(home / "images")}
    wheels = Path(json.loads(as_user("hpcutils", "build", str(recipe), "--dry-run", "--json", **images).stdout)["wheels"])
    if not wheels.is_dir():
        as_user("hpcutils", "build", str(recipe), **images)
        for layer in wheels.parents[1].glob("layers/nccl-check-*.sif"):
            layer.unlink()
    (wheel,) = wheels.glob("horovod-0.28.1-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (library,) = [name for name in archive.namelist() if re.search(r"/tensorflow/mpi_lib\..*\.so$", name)]
        content = archive.read(library)
    assert b"libnccl.so.2\0" in content and b"\0ncclAllReduce\0" in content
    # Compiled for GPUs, not only linked with NCCL: NVIDIA's code for each architecture that the recipe names is inside.
    assert content.count(b"sm_80") > 0 and content.count(b"sm_90") > 0
    shutil.rmtree(home / "images", ignore_errors=True)
