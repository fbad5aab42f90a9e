"""What is copied of a user's code, and its digest."""

import pytest
from fake_slurm import fake_slurm

from hpcutils.errors import RequestError, SpecError
from hpcutils.launch import snapshot as module
from hpcutils.launch.snapshot import code_files, snapshot
from hpcutils.specs.code import why_left_out
from hpcutils.specs.job import load_job


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


def test_a_function_that_would_not_be_copied_is_refused_before_it_is_submitted(tmp_path):
    """The check of train.yaml and the copy are of one mind, file by file."""
    job = tmp_path / "job"
    names = ["model.py", "nets/tiny.py", "runs/x.py", ".hidden/x.py", ".x.py", "__pycache__/x.py", "big.py"]
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "x.py").write_text("")
    for name in names:
        (job / name).parent.mkdir(parents=True, exist_ok=True)
        (job / name).write_text("#" * (2 << 20 if name == "big.py" else 10))
    (job / "link").symlink_to(tmp_path / "lib")
    (job / "linked.py").symlink_to(tmp_path / "lib" / "x.py")
    copied = {path.relative_to(job).as_posix() for path in code_files(job)}
    assert copied == {"model.py", "nets/tiny.py", "linked.py"}
    assert {name for name in [*names, "link/x.py", "linked.py"] if why_left_out(job, name) is None} == copied
    assert why_left_out(job, "./nets//tiny.py") is None
    assert "only files in the folder of train.yaml" in str(why_left_out(job, "../lib/x.py"))
    assert "only files in the folder of train.yaml" in str(why_left_out(job, str(job / "model.py")))
    assert "at most 1 MiB" in str(why_left_out(job, "big.py"))


@pytest.mark.parametrize("key", ["function", "normalizer", "custom_objects"])
@pytest.mark.parametrize("file", ["../lib.py", "{folder}/model.py", "runs/model.py"])
def test_train_yaml_names_no_function_outside_of_the_copy(tmp_path, key, file):
    job = fake_slurm(tmp_path).job
    (job / "runs").mkdir()
    for path in (job / "runs" / "model.py", tmp_path / "lib.py"):
        path.write_text("def build(): ...\n")
    reference = f"{file.format(folder=job)}:build"
    text = (job / "train.yaml").read_text()
    changed = {
        "function": text.replace("model.py:build", reference),
        "normalizer": text.replace("  y: labels", f"  y: labels\n  normalizer: {reference}"),
        "custom_objects": text.replace("model.py:build", f"model.py:build\n  custom_objects: {{Layer: {reference}}}"),
    }
    (job / "train.yaml").write_text(changed[key])
    with pytest.raises(SpecError, match=rf"^train.yaml:\d+:\d+: .*{key}.* would not be there when the job runs: "):
        load_job(job / "train.yaml")
