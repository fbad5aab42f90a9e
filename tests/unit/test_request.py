"""What Slurm is asked for: the batch script as a golden file, and the layouts."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcutils.errors import SlurmRejectedError, SlurmUnavailableError
from hpcutils.launch.executor import batch_script, translate
from hpcutils.launch.request import Layout, plan_layout, plan_request
from hpcutils.rundir import RunDirectory
from hpcutils.specs.job import Job, load_job

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "launch"


def digits(**resources) -> Job:
    job = load_job(ROOT / "jobs" / "digits" / "train.yaml")
    return job.model_copy(update={"resources": job.resources.model_copy(update=resources)})


@pytest.fixture
def slurm_on_path(tmp_path, monkeypatch):
    """submitit asks whether srun and sbatch exist; a login host has them, and this test starts neither."""
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


def script(job: Job, image: Path | None) -> str:
    run = RunDirectory(Path("/shared/runs/digits-20260131-142501-3f9c"))
    text = batch_script(plan_request(job, run, image, Path("/shared/jobs/digits")))
    return text.replace(sys.executable, "/usr/bin/python3")


@pytest.mark.parametrize(
    "name, resources, image",
    [
        ("per_node", {"partition": "main"}, Path("/images/tf.sif")),
        ("per_gpu", {"replication": "per_gpu", "devices": "gpu", "cpus_per_task": 4}, Path("/images/tf.sif")),
        ("no_image", {"time": "1-00:00:30"}, None),
    ],
)
def test_batch_script(name, resources, image, slurm_on_path):
    text = script(digits(**resources), image)
    golden = GOLDEN / f"{name}.sh"
    if os.environ.get("HPCUTILS_UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


def test_the_container_sees_the_manifest_its_source_and_the_cache():
    job = digits()
    staging = job.staging.model_copy(update={"manifest": "lists/a.jsonl", "source": "/big/set", "cache": "/nvme/cache"})
    run = RunDirectory(Path("/shared/runs/x"))
    request = plan_request(job.model_copy(update={"staging": staging}), run, Path("/i.sif"), Path("/shared/jobs/digits"))
    binds = [after for word, after in itertools.pairwise(request.python_argv) if word == "--bind"]
    assert {"/shared/jobs/digits/lists:/shared/jobs/digits/lists:ro", "/big/set:/big/set:ro", "/nvme/cache:/nvme/cache"} <= set(
        binds
    )


FAILED = json.dumps({"rank": 1, "message": 'data "exit_code": 99', "exit_code": 5, "hint": ""}, indent=2)


@pytest.mark.parametrize(
    "srun, files, restarts, requeued, code",
    [
        (0, {"result.json": "{}"}, 0, False, 0),
        (0, {}, 0, False, 9),  # srun ended well, and nothing had run
        (137, {}, 0, False, 137),
        (5, {"failure.json": FAILED}, 0, False, 5),
        (143, {"failure.json": FAILED}, 0, False, 5),  # srun's code is that of a rank which it ended itself
        (75, {"stopped": "2"}, 0, True, None),
        (143, {"stopped": "2"}, 0, True, None),
        (75, {"stopped": "2"}, 3, False, 75),
    ],
)
def test_how_a_batch_script_ends(tmp_path, srun, files, restarts, requeued, code):
    run = RunDirectory(tmp_path / "runs" / "a run")
    run.path.mkdir(parents=True)
    for name, content in files.items():
        (run.path / name).write_text(content)
    lines = plan_request(digits(), run, None, tmp_path).parameters["teardown"]
    script = "\n".join(['scontrol() { echo "$@"; }', f"SLURM_JOB_ID=7 SLURM_RESTART_COUNT={restarts}", f"(exit {srun})", *lines])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert (done.stdout == "requeue 7\n") is requeued
    assert done.returncode == (code or 0)
    assert run.exit_code.exists() is not requeued
    assert requeued or run.exit_code.read_text() == f"{code}\n"


def test_layouts():
    assert plan_layout(digits()) == Layout(2, 1, 4)
    assert plan_layout(digits(replication="per_gpu")) == Layout(2, 4, 1)
    assert plan_layout(digits(replication="per_gpu")).replicas == plan_layout(digits()).replicas == 8


def test_no_slurm_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmUnavailableError, match="no sbatch or srun"):
        script(digits(), None)


@pytest.mark.parametrize(
    "said, error, words",
    [
        (
            "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: Invalid partition name",
            SlurmRejectedError,
            "no partition 'nope'",
        ),
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
            SlurmUnavailableError,
            "does not answer",
        ),
        (
            "sbatch: error: Batch job submission failed: Requested node configuration is not available",
            SlurmRejectedError,
            "refused the job",
        ),
    ],
)
def test_sbatch_complaints(said, error, words):
    request = plan_request(digits(partition="nope"), RunDirectory(Path("/shared/runs/x")), None, Path("/shared/jobs"))
    translated = translate(said, request)
    assert type(translated) is error
    assert words in translated.message
    assert translated.hint
