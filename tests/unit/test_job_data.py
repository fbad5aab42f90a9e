"""From train.yaml to the matrices that a rank reads."""

from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from hpcutils.data.joined import JoinedMatrix
from hpcutils.errors import DataError
from hpcutils.specs.job import Data
from hpcutils.train.session import _open


def arrivals(folder: Path, **sources) -> SimpleNamespace:
    files = {path.name: SimpleNamespace(path=path, sha256="0" * 64) for path in folder.glob("*.h5")}
    return SimpleNamespace(staged=files, sources=sources)


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
            _open(job(**given), arrivals(tmp_path), (name,), part)
        matrix = _open(job(**given, trust_files=True), arrivals(tmp_path), (name,), part)
        assert len(matrix) == (10**9 if name == "x" else 5)


class Bytes:
    """A file that is not on this node yet."""

    def __init__(self, path: Path) -> None:
        self.body = path.read_bytes()
        self.size_bytes, self.reads = len(self.body), 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        buffer[:] = self.body[offset : offset + len(buffer)]


@pytest.mark.parametrize("options", [{}, {"chunks": (7, 3)}, {"chunks": (7, 3), "compression": "gzip"}], ids=str)
def test_lists_of_files_of_which_some_still_arrive(tmp_path, options):
    rows = np.arange(300).reshape(100, 3)
    (tmp_path / "away").mkdir()
    for name, part in (("a.h5", rows[:40]), ("away/b.h5", rows[40:65]), ("c.h5", rows[65:])):
        with h5py.File(tmp_path / name, "w") as file:
            file.create_dataset("x", data=part, **options)
    coming = arrivals(tmp_path)
    coming.staged["b.h5"] = SimpleNamespace(path=tmp_path / "b.h5", sha256="0" * 64)
    coming.sources["b.h5"] = source = Bytes(tmp_path / "away" / "b.h5")
    given = job(files=[{"path": name, "sha256": "0" * 64} for name in ("a.h5", "b.h5", "c.h5")], x="a.h5:x", stage="overlap")
    references = tuple(f"{name}.h5:x" for name in "abc")
    with pytest.raises(DataError, match="b\\.h5"):
        _open(given, SimpleNamespace(staged=coming.staged, sources={}), references, (0, None))
    matrix = _open(given, coming, references, (10, 90))
    assert isinstance(matrix, JoinedMatrix)
    picked = np.array([79, 0, 30, 54, 55, 31, 29])
    for is_there in (False, True):
        if is_there:
            (tmp_path / "away" / "b.h5").rename(tmp_path / "b.h5")
        source.reads = 0
        assert np.array_equal(matrix[:], rows[10:90])
        assert np.array_equal(matrix.read_rows(picked), rows[10:90][picked])
        assert bool(source.reads) is not is_there
    matrix.close()
