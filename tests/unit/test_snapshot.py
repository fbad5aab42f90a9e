"""What is copied of a user's code, and its digest."""

import pytest

from hpcutils.errors import RequestError
from hpcutils.launch import snapshot as module
from hpcutils.launch.snapshot import code_files, snapshot


def test_code_is_copied_and_data_is_not(tmp_path):
    job = tmp_path / "job"
    (job / "nets").mkdir(parents=True)
    for name, text in {"train.yaml": "a: 1\n", "model.py": "x = 1\n", "nets/tiny.py": "y = 2\n"}.items():
        (job / name).write_text(text)
    for name in (".secret/key.py", "__pycache__/model.py", "runs/old/code/model.py", "data.h5", ".hidden.py"):
        (job / name).parent.mkdir(parents=True, exist_ok=True)
        (job / name).write_text("not code\n")
    first = snapshot(job, tmp_path / "copy")
    copied = sorted(path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*") if path.is_file())
    assert copied == ["model.py", "nets/tiny.py", "train.yaml"]
    assert snapshot(job, tmp_path / "again") == first
    (job / "model.py").write_text("x = 3\n")
    assert snapshot(job, tmp_path / "changed") != first


def test_a_folder_that_is_no_job_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_TOTAL_BYTES", 100)
    for number in range(3):
        (tmp_path / f"{number}.py").write_text("#" * 50)
    with pytest.raises(RequestError, match="code files"):
        code_files(tmp_path)
