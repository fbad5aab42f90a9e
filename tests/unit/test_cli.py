"""The command line: what it imports, how it fails, what it prints. Each call is a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "jobs" / "digits" / "train.yaml"
HEAVY = {
    "tensorflow",
    "keras",
    "h5py",
    "mpi4py",
    "numpy",
    "pydantic",
    "ruamel",
    "submitit",
    "horovod",
    "pydot",
    "subprocess",
    "logging",
}


def hpcutils(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hpcutils", *words], cwd=cwd, capture_output=True, text=True, check=False)


def modules_after(code: str, cwd: Path = ROOT) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('\\n'.join(sys.modules))"],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return {line.partition(".")[0] for line in done.stdout.splitlines()}


def test_help_lists_the_commands_and_imports_nothing_heavy():
    done = hpcutils("--help")
    assert done.returncode == 0
    assert "submit   Submit a training job to Slurm." in done.stdout
    loaded = modules_after("import contextlib\nfrom hpcutils.cli import cli\nwith contextlib.suppress(SystemExit): cli(['--help'])")
    assert not loaded & HEAVY, loaded & HEAVY
    assert "click" in loaded


def test_importing_the_package_or_the_nine_names_imports_nothing_heavy():
    assert not modules_after("import hpcutils, hpcutils.utils") & {"tensorflow", "keras", "h5py", "mpi4py"}


def test_dry_run_prints_the_script_and_imports_no_tensorflow(tmp_path):
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "image.sif").write_bytes(b"a stand-in: a dry run does not open it")
    words = ["submit", str(DIGITS), "--dry-run", "--image", str(tmp_path / "image.sif"), "--nodes", "2", "--gpus", "8"]
    code = f"import os; os.environ['PATH'] = {str(tmp_path)!r} + os.pathsep + os.environ['PATH']\nfrom hpcutils.cli import cli\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}cli({words!r}, standalone_mode=False)\nimport sys; print('MODULES', *sys.modules)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    script, _, loaded = done.stdout.rpartition("MODULES ")
    assert "#SBATCH --nodes=2" in script
    assert "#SBATCH --gpus-per-node=4" in script
    assert "--mpi=pmix" in script
    assert not {name.partition(".")[0] for name in loaded.split()} & {"tensorflow", "keras", "h5py", "mpi4py"}
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["submit", "gone.yaml"], 2, "gone.yaml: cannot be read"),
        (["submit", str(DIGITS), "--gpus", "7", "--nodes", "2"], 3, "--gpus 7 does not divide by --nodes 2"),
        (["submit", str(DIGITS), "--image", "no-such-image"], 4, "no-such-image"),
        (["submit", str(DIGITS), "--image", "x" * 5000], 4, "no such image"),
        (["submit", "x" * 5000], 2, "cannot be read"),
        (["submit", str(DIGITS), "--time", "1h"], 2, "--time: resources.time: "),
        (["submit", str(DIGITS), "--nodes", "0"], 2, "--nodes: resources.nodes: 1 or more was expected, got 0"),
        (["run", str(DIGITS), "--ranks", "2", "--gpus", "3"], 3, "--gpus 3 does not divide by --ranks 2"),
        (["status", "gone"], 2, "no run called 'gone'"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_failures_have_codes_hints_and_leave_nothing(words, code, said, tmp_path):
    done = hpcutils(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_unknown_keys_exit_2_and_submit_nothing(tmp_path):
    text = DIGITS.read_text().replace("epochs:", "epoch:")
    (tmp_path / "train.yaml").write_text(text)
    done = hpcutils("submit", "train.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown key 'epoch'; did you mean 'epochs'?" in done.stderr
    assert "hint: " in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["train.yaml"]


def test_status_of_a_finished_run(tmp_path):
    run = tmp_path / "runs" / "tiny-1"
    run.mkdir(parents=True)
    (run / "job.json").write_text("{}")
    (run / "slurm.json").write_text('{"job_id": "12"}')
    (run / "exit_code").write_text("137\n")
    (run / "logs").mkdir()
    (run / "logs" / "batch.log").write_text("srun: error: node2: task 3: Killed\n")
    done = hpcutils("status", "tiny", "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert (answer["state"], answer["exit_code"], answer["job_id"]) == ("FAILED", 137, "12")
    assert answer["reason"] == "rank 3 on node2 was killed by signal 9 (SIGKILL)"
