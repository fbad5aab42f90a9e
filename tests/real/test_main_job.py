"""The main job: a real Slurm, a real SIF, real ranks on two nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import Cluster, own, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.apptainer]


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_rank(cluster: Cluster, image: str) -> Path:
    """The first epoch on one rank with one device, the figure that others are held to."""
    run, result = cluster.follow(cluster.job(), "--nodes", "1", "--gpus", "1", "--epochs", "1")
    assert (result["world_size"], result["replicas"]) == (1, 1)
    return run


@pytest.mark.parametrize("replication, world_size", [("per_node", 2), ("per_gpu", 8)])
def test_two_nodes(cluster, image, one_rank, replication, world_size):
    run, result = cluster.follow(cluster.job(), "--nodes", "2", "--gpus", "8", "--replication", replication)
    assert (result["nodes"], result["world_size"], result["replicas"]) == (2, world_size, 8)
    assert result["accuracy"] >= 0.96
    assert result["coverage"] == "exact"
    assert result["reducer"] == "horovod 0.28.1"
    epochs, alone = lines(run), lines(one_rank)
    assert [line["epoch"] for line in epochs] == list(range(1, 15))
    for name in ("loss", "val_loss", "accuracy", "val_accuracy"):
        assert epochs[0][name] == pytest.approx(alone[0][name], abs=1e-4), name
    check_run_directory(run, world_size)
    check_weights(cluster, run, world_size, result)


def check_run_directory(run: Path, world_size: int) -> None:
    present = {path.name for path in run.iterdir()}
    assert {
        "job.json",
        "code",
        "sbatch.sh",
        "logs",
        "checkpoints",
        "model.keras",
        "summary.txt",
        "model.png",
        "metrics.jsonl",
    } <= present
    assert (run / "exit_code").read_text() == "0\n"
    assert (run / "model.png").read_bytes().startswith(b"\x89PNG")
    assert "digits" in (run / "summary.txt").read_text()
    assert {f"rank-{rank}.log" for rank in range(world_size)} == {path.name for path in (run / "logs" / "restart-0").iterdir()}
    known = json.loads((run / "provenance.json").read_text())
    assert re.fullmatch("[0-9a-f]{64}", known["image"]["sha256"])
    assert known["data"] == {"digits.h5": "bfb208d9924ff1a049a690246dc177adea1d07e860d60f34d4b48b7c6aa73f49"}
    assert known["versions"]["tensorflow"] == "2.18.1"
    assert known["slurm"]["slurm_job_id"] == json.loads((run / "slurm.json").read_text())["job_id"]


def check_weights(cluster: Cluster, run: Path, world_size: int, result: dict) -> None:
    """Each rank logs the digest of the weights that it holds; the saved model, loaded without hpcutils, has the same."""
    logs = [(run / "logs" / "restart-0" / f"rank-{rank}.log").read_text() for rank in range(world_size)]
    digests = [re.findall(r"weights sha256 ([0-9a-f]{64})", log) for log in logs]
    assert digests == [[result["weights_sha256"]]] * world_size
    code = (
        "import hashlib, keras, sys; state = hashlib.sha256()\n"
        f"for value in keras.saving.load_model({str(run / 'model.keras')!r}).get_weights(): state.update(value.tobytes())\n"
        "assert not any(name.startswith(('hpcutils', 'horovod')) for name in sys.modules)\n"
        "print(state.hexdigest())"
    )
    assert cluster.run("python", "-c", code, cwd=run).stdout.split()[-1] == result["weights_sha256"]


def test_the_second_job_finds_the_data_staged(cluster, one_rank):
    folder = cluster.job()
    run, _ = cluster.follow(folder, "--nodes", "1", "--gpus", "1", "--epochs", "1")
    first, second = ((path / "logs" / "current" / "rank-0.log").read_text() for path in (one_rank, run))
    assert "digits.h5: on this node already" in second
    assert re.search(r"digits.h5: (116.1 KiB on 1 of 1 nodes .* read 1.00 times|on this node already)", first)


@pytest.mark.parametrize("variable, inside", [("TMPDIR", "hpcutils-*/cache"), ("HPCUTILS_NODE_CACHE", "not/there/yet")])
def test_folders_that_the_users_variables_name_are_seen_inside(cluster, image, variable, inside):
    """Scratch elsewhere than in /tmp, as many sites have it, or a cache that the first job has to make."""
    folder = cluster.job()
    (folder / "disk").mkdir()
    own(folder)
    named = folder / "disk" / (inside if "*" not in inside else "")
    words = ("hpcutils", "submit", "train.yaml", "--follow", "--json", "--nodes", "1", "--gpus", "1", "--epochs", "1")
    done = cluster.run("env", f"{variable}={named}", *words, cwd=folder)
    run = Path(json.loads(done.stdout)["path"])
    assert "digits.h5: 116.1 KiB on 1 of 1 nodes" in (run / "logs" / "current" / "rank-0.log").read_text()
    (cache,) = (folder / "disk").glob(inside)
    assert max(path.stat().st_size for path in cache.rglob("*") if path.is_file()) > 100 << 10


def test_training_while_the_data_arrives_ends_with_the_same_weights(cluster, image):
    """On two nodes whose caches are empty, gradients by Horovod and segments by the leaders' threads at one time."""
    weights = {}
    for stage in ("before", "overlap"):
        folder = cluster.job(f"stage-{stage}", make=f"stage: {stage}\n  make: make_data.py")
        words = ("hpcutils", "submit", "train.yaml", "--follow", "--json", "--nodes", "2", "--gpus", "4", "--epochs", "2")
        done = cluster.run("env", f"HPCUTILS_NODE_CACHE=/tmp/{folder.name}", *words, cwd=folder)
        run = Path(json.loads(done.stdout)["path"])
        assert "digits.h5: 116.1 KiB on 2 of 2 nodes" in (run / "logs" / "current" / "rank-0.log").read_text()
        (staging,) = json.loads((run / "provenance.json").read_text())["staging"]
        assert ("read_through_bytes" in staging) == (stage == "overlap")
        assert [line["coverage"] for line in lines(run)] == ["exact", "exact"]
        weights[stage] = json.loads((run / "result.json").read_text())["weights_sha256"]
    assert weights["before"] == weights["overlap"]


def test_a_sequence_of_the_users_own_on_two_nodes(cluster, image):
    """Batches by threads, and by processes that know nothing of Slurm and MPI: the same ones, so the same figures."""
    losses = []
    for processes in ("false", "true"):
        folder = cluster.job(f"sequence-{processes}", "sequence", workers=f"workers: 1\n  use_processes: {processes}")
        run, result = cluster.follow(folder, "--epochs", "2")
        assert (result["nodes"], result["world_size"], result["coverage"]) == (2, 2, "exact")
        losses.append([line["loss"] for line in lines(run)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_dry_run_shows_the_script_that_is_submitted(cluster, image):
    folder = cluster.job()
    dry = cluster.hpcutils("submit", "train.yaml", "--dry-run", "--partition", "debug", cwd=folder).stdout
    assert not (folder / "runs").exists()
    done = cluster.hpcutils("submit", "train.yaml", "--json", "--partition", "debug", cwd=folder)
    run = Path(json.loads(done.stdout)["path"])
    cluster.hpcutils("cancel", run.name, cwd=folder)
    dry_id = re.search(r"digits-\d{8}-\d{6}-[0-9a-f]{4}", dry)[0]
    shown = dry[dry.index("#!/bin/bash") :].replace(dry_id, run.name)
    assert shown.rstrip() == (run / "sbatch.sh").read_text().rstrip()


def ranks_of(job_id: str) -> dict[int, int]:
    """Return {rank: pid} of a job's Python processes on this machine."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environ = dict(pair.partition(b"=")[::2] for pair in (entry / "environ").read_bytes().split(b"\0"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if words[0].endswith(b"python3") and b"submitit.core._submit" in words and environ.get(b"SLURM_JOB_ID") == job_id.encode():
            found[int(environ[b"SLURM_PROCID"])] = int(entry.name)
    return found


def submit(cluster: Cluster, folder: Path, *words: str) -> tuple[Path, str]:
    answer = json.loads(cluster.hpcutils("submit", "train.yaml", "--json", *words, cwd=folder).stdout)
    return Path(answer["path"]), answer["job_id"]


def test_a_rank_killed_in_mid_epoch_ends_the_job_and_is_named(cluster, image):
    folder = cluster.job()
    run, job_id = submit(cluster, folder, "--replication", "per_gpu", "--gpus", "4", "--epochs", "5000")
    wait_until(lambda: (run / "metrics.jsonl").is_file(), 180, "the first epoch")
    ranks = ranks_of(job_id)
    assert sorted(ranks) == [0, 1, 2, 3]
    os.kill(ranks[3], signal.SIGKILL)
    took_s = wait_until(lambda: (run / "exit_code").is_file(), 20, "the end of the job")
    print(f"over {took_s:.1f} s after the kill")
    wait_until(lambda: not ranks_of(job_id), 20 - took_s, "the end of every rank")
    done = cluster.hpcutils("status", run.name, "--json", cwd=folder)
    answer = json.loads(done.stdout)
    assert answer["state"] == "FAILED"
    # srun's: the highest of all ranks, of which it terminated (15) those that the killed one (9) left behind.
    assert answer["exit_code"] in (128 + signal.SIGKILL, 128 + signal.SIGTERM)
    assert answer["reason"] == "rank 3 on node2 was killed by signal 9 (SIGKILL)"


def test_follow_tells_which_rank_was_killed(cluster, image):
    folder = cluster.job()
    run, job_id = submit(cluster, folder, "--epochs", "5000")
    wait_until(lambda: (run / "metrics.jsonl").is_file(), 180, "the first epoch")
    os.kill(ranks_of(job_id)[1], signal.SIGKILL)
    wait_until(lambda: (run / "exit_code").is_file(), 20, "the end of the job")
    code = "import sys; from pathlib import Path; from hpcutils.launch import monitor; from hpcutils.rundir import RunDirectory\n"
    code += f"run = RunDirectory(Path({str(run)!r})); error = monitor.verdict_error(monitor.follow(run, sys.stderr), run)\n"
    code += "print(error); sys.exit(error.exit_code)"
    done = cluster.run("python", "-c", code, cwd=folder, check=False)
    assert done.returncode == 9
    assert "rank 1 on node2 was killed by signal 9 (SIGKILL)" in done.stdout
    assert "epoch 1/5000" in done.stderr


@pytest.mark.parametrize(
    "changes, words, code, said",
    [
        (
            {"- path": "- path: digits.h5\n      # the digest of something else", "sha256": f"sha256: {'ab' * 32}"},
            (),
            6,
            "digits.h5",
        ),
        ({"x": "x: pictures"}, (), 5, "pictures"),
        ({}, ("--devices", "gpu"), 11, "the job asks for GPUs and this rank sees none (Slurm gave it "),
        ({"function": "function: model.py:nothing"}, (), 2, "has no function 'nothing'"),
        ({"loss": "loss: no_such_loss"}, (), 9, "no_such_loss"),
    ],
    ids=["sha256", "dataset", "devices", "function", "loss"],
)
def test_failures_in_the_job_reach_the_terminal(cluster, image, changes, words, code, said):
    folder = cluster.job(**changes)
    started = time.monotonic()
    done = cluster.hpcutils("submit", "train.yaml", "--follow", "--nodes", "2", "--gpus", "2", *words, cwd=folder, check=False)
    assert done.returncode == code, done.stderr
    message = done.stderr[done.stderr.rindex("error: ") :]
    assert said in message
    assert re.search(r"rank \d on node\d", message)
    assert "hint: " in message
    assert time.monotonic() - started < 60


def test_a_wrong_digest_leaves_no_file_in_the_cache(cluster, image):
    folder = cluster.job(sha256=f"sha256: {'cd' * 32}")
    done = cluster.hpcutils("submit", "train.yaml", "--follow", "--nodes", "1", "--gpus", "1", cwd=folder, check=False)
    assert done.returncode == 6
    for node in ("node1", "node2"):
        found = cluster.sandbox("exec", "--node", node, "--", "find", "/tmp", "-path", f"*{'cd' * 32}*", "-type", "f")
        assert found.stdout == ""


def test_a_partition_that_does_not_exist(cluster, image):
    folder = cluster.job()
    done = cluster.hpcutils("submit", "train.yaml", "--partition", "nowhere", cwd=folder, check=False)
    assert done.returncode == 7
    assert "Slurm knows no partition 'nowhere'" in done.stderr
    assert "hint: see 'sinfo -s'" in done.stderr
    assert not (folder / "runs").exists() or list((folder / "runs").iterdir()) == []


def test_the_time_limit_comes_near_and_the_job_goes_on_after_a_requeue(cluster, image):
    folder = cluster.job()
    run, job_id = submit(cluster, folder, "--gpus", "2", "--epochs", "40")
    wait_until(lambda: (run / "metrics.jsonl").is_file(), 180, "the first epoch")
    # What Slurm does 90 s before the time limit (#SBATCH --signal=B:USR2@90).
    cluster.run("scancel", "--batch", "--signal=USR2", job_id)
    log = run / "logs" / "restart-0" / "rank-0.log"
    wait_until(lambda: "the time limit is near" in log.read_text(), 30, "the stop at an epoch's end")
    stopped_after = int(re.search(r"stopping after epoch (\d+)", log.read_text())[1])

    def state() -> str:
        return cluster.run("scontrol", "--oneliner", "show", "job", job_id).stdout

    def found() -> str:
        files = sorted(run.rglob("*.log")) + sorted(run.glob("logs/*.out"))
        return "\n".join([state(), *(f"{file}:\n{file.read_text()[-2000:]}" for file in files)])

    wait_until(lambda: "JobState=PENDING" in state(), 60, "the requeue", found)
    wait_until(lambda: not ranks_of(job_id), 30, "the end of the first start")
    # Slurm holds a requeued job back for two minutes, so that the nodes can clean up: a few seconds will do here.
    time.sleep(12)
    cluster.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")
    wait_until(lambda: (run / "exit_code").is_file(), 150, "the end of the second start")
    assert (run / "exit_code").read_text() == "0\n"
    assert [line["epoch"] for line in lines(run)] == list(range(1, 41))
    again = (run / "logs" / "restart-1" / "rank-0.log").read_text()
    assert f"epoch {stopped_after + 1}/40" in again
    assert f"epoch {stopped_after}/40" not in again


def test_a_launch_without_pmix_is_an_error_within_seconds(cluster, image):
    folder = cluster.job()
    run, _ = submit(cluster, folder, "--gpus", "2", "--epochs", "1")
    wait_until(lambda: (run / "exit_code").is_file(), 180, "the run that is tried again by hand")
    started = time.monotonic()
    words = ("srun", "--mpi=none", "-N", "2", "--ntasks-per-node=1", "python", "-m", "hpcutils.train.entry", str(run))
    done = cluster.run(*words, cwd=folder, check=False)
    assert done.returncode == 10
    assert "without PMIx" in done.stderr
    assert "--mpi=pmix" in done.stderr
    assert time.monotonic() - started < 30
