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
from hpcutils.specs.job import DataFile, Job, load_job
from hpcutils.specs.site import Site

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


def test_the_container_sees_the_folder_of_a_file_url(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.h5").write_bytes(b"")
    (tmp_path / "li nk").mkdir()
    (tmp_path / "li nk" / "a.h5").symlink_to(tmp_path / "real" / "a.h5")
    job = digits()
    url = f"file://{tmp_path}/li%20nk/a.h5"
    files = (*job.data.files, DataFile(url=url, sha256="ab" * 32), DataFile(url="https://x/etc/b.h5", sha256="ab" * 32))
    staging = job.staging.model_copy(update={"manifest": "m.jsonl", "source": "file:///big/set"})
    job = job.model_copy(update={"data": job.data.model_copy(update={"files": files}), "staging": staging})
    request = plan_request(job, RunDirectory(Path("/shared/runs/x")), Path("/i.sif"), Path("/shared/jobs/digits"))
    binds = [after for word, after in itertools.pairwise(request.python_argv) if word == "--bind"]
    folders = [f"{tmp_path}/li nk", f"{tmp_path}/real", "/big/set"]
    assert {f"{folder}:{folder}:ro" for folder in folders} <= set(binds)
    assert not [bound for bound in binds if "etc" in bound]


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


def test_a_restart_forgets_what_the_start_before_it_left(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "a run")
    run.checkpoints.mkdir(parents=True)
    stale = [run.stop, run.stopped, run.failure, run.result, run.exit_code]
    for path in [*stale, run.metrics, run.checkpoints / "epoch-0001.keras"]:
        path.write_text("from before")
    lines = plan_request(digits(), run, None, tmp_path).parameters["setup"]
    script = "\n".join(["export SLURM_RESTART_COUNT=1", *lines])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in stale if path.exists()] == []
    assert run.metrics.exists() and (run.checkpoints / "epoch-0001.keras").exists()
    assert run.current_logs.resolve().name == "restart-1"


def test_layouts():
    assert plan_layout(digits()) == Layout(2, 1, 4)
    assert plan_layout(digits(replication="per_gpu")) == Layout(2, 4, 1)
    assert plan_layout(digits(replication="per_gpu")).replicas == plan_layout(digits()).replicas == 8


def test_no_slurm_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmUnavailableError, match="no sbatch or srun"):
        script(digits(), None)


REFUSALS = [
    "User's group not permitted to use this partition",
    "Invalid account or account/partition combination specified",
    "Requested partition configuration not available now",
    "unable to resolve socket-id",
    "Requested time limit is invalid (missing or exceeds some limit)",
]
SITE = Site.model_validate({"launch": {"partition": "batch"}})


@pytest.mark.parametrize("said", REFUSALS)
@pytest.mark.parametrize(
    "partition, site, words",
    [("gpu", SITE, "partition 'gpu'"), (None, SITE, "partition 'batch'"), (None, Site(), "default partition")],
)
def test_a_refusal_names_the_partition_that_was_asked(said, partition, site, words):
    request = plan_request(digits(partition=partition), RunDirectory(Path("/shared/runs/x")), None, Path("/jobs"), site)
    translated = translate(f"sbatch: error: Batch job submission failed: {said}", request)
    assert type(translated) is SlurmRejectedError
    assert translated.message.startswith("Slurm refused the job (")
    assert words in translated.message and said in translated.message
    assert "None" not in translated.message


@pytest.mark.parametrize(
    "said",
    [
        "Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "Batch job submission failed: Socket timed out on send/recv operation",
        'Munge encode failed: Failed to access "/run/munge/munge.socket.2": No such file or directory',
        "Batch job submission failed: Protocol authentication error",
        "Batch job submission failed: Zero Bytes were transmitted or received",
        "slurm_persist_conn_open: Connection refused",
        "Unable to establish controller machine",
        "Batch job submission failed: Slurm backup controller in standby mode",
    ],
)
def test_no_answer(said):
    request = plan_request(digits(partition="gpu"), RunDirectory(Path("/shared/runs/x")), None, Path("/shared/jobs"))
    assert type(translate(f"sbatch: error: {said}", request)) is SlurmUnavailableError


def test_the_default_partition_may_be_missing():
    request = plan_request(digits(), RunDirectory(Path("/shared/runs/x")), None, Path("/shared/jobs"))
    said = "sbatch: error: Batch job submission failed: No partition specified or system default partition"
    assert "default partition" in translate(said, request).message


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
