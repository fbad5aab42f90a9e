"""Submitting: what Slurm accepted is never lost, what it refused leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm, fake_slurm

from hpcutils.errors import HpcutilsError, SlurmRejectedError, SlurmUnavailableError
from hpcutils.launch import executor, runs
from hpcutils.launch.request import plan_request
from hpcutils.specs.job import load_job

INTERRUPTS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    made = fake_slurm(tmp_path)
    monkeypatch.setenv("PATH", str(made.bin), prepend=os.pathsep)
    return made


def submit(slurm: FakeSlurm) -> runs.Submitted:
    """Submit the small job from this process."""
    job = load_job(slurm.job / "train.yaml")
    return runs.submit_run(lambda run: plan_request(job, run, None, slurm.job), slurm.job / "runs", "tiny", slurm.job, None, print)


def test_an_accepted_job_is_in_its_run_directory(slurm):
    done = slurm.run("submit", "train.yaml", "--json")
    answer = json.loads(done.stdout)
    assert (answer["job_id"], [answer["path"]]) == ("77", [str(path) for path in slurm.runs()])
    assert json.loads((slurm.runs()[0] / "slurm.json").read_text()) == {"job_id": "77"}
    assert (slurm.runs()[0] / "sbatch.sh").read_text().startswith("#!/bin/bash")


@pytest.mark.parametrize("number", INTERRUPTS)
def test_an_interrupt_cancels_the_job_that_was_just_accepted(slurm, number):
    slurm.command("sbatch", f"touch {slurm.bin}/now; sleep 1; echo Submitted batch job 77")
    process = slurm.start("submit", "train.yaml", "--json")
    out, err = slurm.interrupt(process, slurm.bin / "now", number)
    assert (process.returncode, out) == (130, "")
    assert "job 77" in err
    assert "cancelled" in err
    assert "Traceback" not in err
    assert slurm.asked("scancel") == ["77"]
    # Slurm knew the job: its record stays.
    assert [json.loads((path / "slurm.json").read_text()) for path in slurm.runs()] == [{"job_id": "77"}]


def test_a_job_that_cannot_be_cancelled_is_named(slurm):
    slurm.command("sbatch", f"touch {slurm.bin}/now; sleep 1; echo Submitted batch job 77")
    slurm.command("scancel", "echo 'scancel: error: no controller' >&2; exit 1")
    process = slurm.start("submit", "train.yaml")
    _, err = slurm.interrupt(process, slurm.bin / "now", signal.SIGINT)
    assert process.returncode == 130
    assert "job 77" in err
    assert "scancel 77" in err
    assert len(slurm.runs()) == 1


@pytest.mark.parametrize("number", INTERRUPTS)
def test_an_interrupt_ends_a_hanging_sbatch_and_leaves_nothing(slurm, number):
    slurm.command("sbatch", f"touch {slurm.bin}/now; exec sleep 300")
    started = time.monotonic()
    process = slurm.start("submit", "train.yaml")
    out, err = slurm.interrupt(process, slurm.bin / "now", number)
    assert (process.returncode, out) == (130, "")
    assert "interrupted" in err
    assert "squeue" in err  # the request may have arrived
    assert time.monotonic() - started < 50
    assert not (slurm.job / "runs").exists()


def test_an_sbatch_that_hangs_is_given_up(slurm, monkeypatch):
    slurm.command("sbatch", "exec sleep 300")
    monkeypatch.setattr(executor, "SBATCH_TIMEOUT_S", 0.5)
    with pytest.raises(SlurmUnavailableError, match=r"sbatch.*within 0.5 s") as caught:
        submit(slurm)
    assert "squeue" in caught.value.hint
    assert not (slurm.job / "runs").exists()


def test_a_run_of_the_same_name_stays_as_it_is(slurm, monkeypatch):
    taken = slurm.job / "runs" / "tiny-1"
    taken.mkdir(parents=True)
    (taken / "job.json").write_text("another's")
    names = iter(["tiny-1", "tiny-1", "tiny-2"])
    monkeypatch.setattr(runs, "new_run_id", lambda name: next(names))
    submitted = submit(slurm)
    assert (submitted.run.run_id, submitted.job_id) == ("tiny-2", "77")
    assert [path.name for path in taken.iterdir()] == ["job.json"]
    assert f"--chdir={submitted.run.path}" in (submitted.run.path / "sbatch.sh").read_text()


def test_a_failure_after_acceptance_names_the_job_and_keeps_its_directory(slurm, monkeypatch):
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(executor, "keep_script", no_space)
    with pytest.raises(HpcutilsError, match=r"No space left.*job 77") as caught:
        submit(slurm)
    assert "cancelled" in caught.value.message
    assert slurm.asked("scancel") == ["77"]
    assert [json.loads((path / "slurm.json").read_text()) for path in slurm.runs()] == [{"job_id": "77"}]


def test_signals_are_as_before_afterwards(slurm):
    before = [signal.getsignal(number) for number in INTERRUPTS]
    submit(slurm)
    assert [signal.getsignal(number) for number in INTERRUPTS] == before


def test_an_answer_without_a_job_number_is_shown(slurm):
    slurm.command("sbatch", "echo 'see you later'")
    with pytest.raises(SlurmRejectedError, match="see you later"):
        submit(slurm)


def test_a_refused_job_leaves_nothing(slurm):
    slurm.command("sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid partition name' >&2; exit 1")
    done = slurm.run("submit", "train.yaml", "--partition", "nope")
    assert done.returncode == 7
    assert done.stderr.count("Invalid partition name") == 1  # submitit itself would print it once more
    assert not (slurm.job / "runs").exists()


@pytest.mark.parametrize("words", [["submit", "train.yaml"], ["run", "train.yaml"]])
def test_runs_that_cannot_be_made(slurm, words):
    done = slurm.run(*words, "--runs", "model.py/deep")
    assert done.returncode == 2
    assert "model.py/deep" in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
