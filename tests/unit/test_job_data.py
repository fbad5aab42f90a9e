"""From train.yaml to the matrices that a rank reads."""

from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from hpcutils.errors import DataError
from hpcutils.specs.job import Data
from hpcutils.train.session import _open


def staged(folder: Path) -> dict:
    return {path.name: SimpleNamespace(path=path, sha256="0" * 64) for path in folder.glob("*.h5")}


def job(**data) -> SimpleNamespace:
    return SimpleNamespace(data=Data.model_validate({"y": "y", **data}))


def test_files_that_are_trusted_may_claim_and_lead_elsewhere(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (10**9, 1000), "f4", chunks=(64, 1000), compression="gzip")
        file["y"] = h5py.ExternalLink("elsewhere/b.h5", "/y")
    (tmp_path / "elsewhere").mkdir()
    with h5py.File(tmp_path / "elsewhere" / "b.h5", "w") as file:
        file["y"] = np.arange(9)
    given = {"files": [{"path": "a.h5"}], "x": "x"}
    for name, part in (("x", (0, None)), ("y", (2, 7))):
        with pytest.raises(DataError, match=r"trust_files: true"):
            _open(job(**given), staged(tmp_path), (name,), part)
        matrix = _open(job(**given, trust_files=True), staged(tmp_path), (name,), part)
        assert len(matrix) == (10**9 if name == "x" else 5)
