"""Watching a run: a Slurm that is slow, away or forgetful, files that come late, and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm, fake_slurm

from hpcutils.errors import EXIT_REQUEUE, DataError, JobFailedError, SlurmUnavailableError
from hpcutils.launch import monitor
from hpcutils.rundir import RunDirectory

AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
WRITES_137 = 'echo 137 > "$(dirname "$(dirname "$1")")/exit_code"; echo Submitted batch job 77'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    made = fake_slurm(tmp_path)
    monkeypatch.setenv("PATH", str(made.bin), prepend=os.pathsep)
    monkeypatch.setattr(monitor, "POLL_S", 0.05)
    monkeypatch.setattr(monitor, "SLURM_POLL_S", 0.05)
    monkeypatch.setattr(monitor, "VISIBLE_S", 1.0)
    return made


@pytest.fixture
def run(slurm: FakeSlurm) -> RunDirectory:
    path = slurm.job / "runs" / "tiny-1"
    path.mkdir(parents=True)
    (path / "slurm.json").write_text('{"job_id": "77"}')
    (path / "job.json").write_text("{}")
    return RunDirectory(path)


def says(state: str, code: str = "0:0") -> str:
    return f"echo 'JobId=77 JobName=tiny JobState={state} Reason=None ExitCode={code}'"


def in_turn(folder: Path, *scripts: str) -> str:
    """Return a script that does the first of `scripts` at its first call, and so on; the last one stays."""
    cases = "\n".join(f"  {number}) {script};;" for number, script in enumerate(scripts[:-1], start=1))
    return f"n=$(wc -l < {folder}/scontrol.asked)\ncase $n in\n{cases}\n  *) {scripts[-1]};;\nesac"


def test_a_hanging_scontrol_is_no_answer(slurm, run, monkeypatch):
    monkeypatch.setattr(monitor, "SCONTROL_TIMEOUT_S", 0.3)
    slurm.command("scontrol", "exec sleep 100")
    with pytest.raises(SlurmUnavailableError, match=r"within 0.3 s") as caught:
        monitor.status(run)
    assert "scontrol ping" in caught.value.hint


def test_no_scontrol_is_no_slurm(run, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SlurmUnavailableError, match="no scontrol"):
        monitor.status(run)


def test_follow_bears_with_a_short_outage(slurm, run):
    slurm.command("scontrol", in_turn(slurm.bin, says("RUNNING"), AWAY, AWAY, says("RUNNING"), says("COMPLETED")))
    out = io.StringIO()
    assert monitor.follow(run, out).exit_code == 0
    lines = out.getvalue().splitlines()
    assert [line.split()[1:4] for line in lines] == [["job", "77", "running"], ["Slurm", "does", "not"], ["job", "77", "running"]]
    assert "the job goes on" in lines[1]


def test_follow_gives_up_after_a_long_one(slurm, run, monkeypatch):
    monkeypatch.setattr(monitor, "OUTAGE_S", 0.3)
    slurm.command("scontrol", AWAY)
    with pytest.raises(SlurmUnavailableError, match="Unable to contact"):
        monitor.follow(run, io.StringIO())
    assert len(slurm.asked("scontrol")) > 1


def test_the_exit_code_may_come_later_than_slurms_word(slurm, run):
    slurm.command("scontrol", says("FAILED", "1:0"))
    writer = threading.Timer(0.4, lambda: run.exit_code.write_text("5\n"))
    writer.start()
    assert monitor.status(run).exit_code == 5
    writer.join()


@pytest.mark.parametrize(
    "state, code, exit_code",
    [("COMPLETED", "0:0", 0), ("FAILED", "7:0", 7), ("CANCELLED", "0:15", 9), ("NODE_FAIL", "0:0", 9)],
)
def test_slurms_word_counts_where_the_file_never_comes(slurm, run, state, code, exit_code):
    slurm.command("scontrol", says(state, code))
    current = monitor.status(run)
    assert (current.state, current.exit_code) == (state, exit_code)


def test_a_users_own_exit_code_is_none_of_ours(run):
    run.exit_code.write_text("3\n")
    error = monitor.verdict_error(monitor.status(run), run)
    assert type(error) is JobFailedError
    run.failure.write_text(json.dumps({"rank": 1, "node": "node2", "message": "no dataset", "hint": "look", "exit_code": 5}))
    run.exit_code.write_text("5\n")
    error = monitor.verdict_error(monitor.status(run), run)
    assert type(error) is DataError
    assert "rank 1 on node2: no dataset" in error.message


@pytest.mark.parametrize("word", ["3", "0", "'bye'", ""])
def test_sys_exit_in_a_rank_is_a_failure_of_the_job(run, word):
    code = (
        "import sys\nfrom hpcutils.train import main\nfrom hpcutils.train.entry import run_rank\n"
        f"main.train = lambda run, world: sys.exit({word})\nrun_rank({str(run.path)!r})"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI"))}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == JobFailedError.exit_code, done.stderr
    failure = json.loads(run.failure.read_text())
    assert failure["exit_code"] == JobFailedError.exit_code
    assert "sys.exit" in failure["message"]


def test_a_stop_at_a_checkpoint_is_no_failure(run):
    code = (
        "from hpcutils.train import main, stop\nfrom hpcutils.train.entry import run_rank\n"
        f"def train(run, world): raise stop.StoppedToGoOn()\nmain.train = train\nrun_rank({str(run.path)!r})"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI"))}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, run.failure.exists()) == (EXIT_REQUEUE, False), done.stderr


def test_ctrl_c_leaves_the_job_alone_and_says_so(slurm):
    slurm.command("scontrol", f"{says('RUNNING')}; touch {slurm.bin}/now")
    process = slurm.start("submit", "train.yaml", "--follow", "--json")
    out, err = slurm.interrupt(process, slurm.bin / "now", signal.SIGINT)
    answer = json.loads(out)
    assert (process.returncode, answer["job_id"], answer["state"], answer["exit_code"]) == (130, "77", "UNKNOWN", None)
    assert "(job 77) goes on" in err
    assert "hpcutils cancel" in err and "--follow" in err
    assert "Traceback" not in err
    assert slurm.asked("scancel") == []


def test_logs_can_be_followed_later(slurm, run):
    run.exit_code.write_text("0\n")
    (run.logs / "restart-0").mkdir(parents=True)
    run.current_logs.symlink_to("restart-0")
    run.rank_log(0).write_text("epoch 1\n")
    done = slurm.run("logs", "tiny", "--follow")
    assert (done.returncode, done.stdout) == (0, "epoch 1\n")
    run.exit_code.write_text("137\n")
    assert slurm.run("logs", "tiny", "--follow").returncode == 9


def test_a_failed_run_is_told_to_programs_as_well(slurm):
    slurm.command("sbatch", WRITES_137)
    done = slurm.run("submit", "train.yaml", "--follow", "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 9
    assert (answer["job_id"], answer["state"], answer["exit_code"]) == ("77", "FAILED", 137)
    assert (answer["run"], answer["path"]) == (slurm.runs()[0].name, str(slurm.runs()[0]))
    assert "exit code 137" in answer["error"]
    assert answer["error"] in done.stderr


def test_a_run_that_went_well_is_told_with_its_state(slurm):
    slurm.command("sbatch", WRITES_137.replace("137", "0"))
    done = slurm.run("submit", "train.yaml", "--follow", "--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["state"], answer["exit_code"]) == (0, "COMPLETED", 0)
    assert "error" not in answer


def test_a_dry_run_for_programs(slurm):
    done = slurm.run("submit", "train.yaml", "--dry-run", "--json")
    answer = json.loads(done.stdout)
    assert answer["layout"] == {"nodes": 1, "ranks_per_node": 1, "devices_per_rank": 1}
    assert answer["image"] is None
    assert answer["commands"][0] == f"mkdir -p {answer['path']}"
    assert answer["commands"][1].startswith("sbatch ")
    assert answer["script"].startswith("#!/bin/bash")
    assert answer["path"].endswith(answer["run"])
    assert slurm.asked("sbatch") == []
    assert not (slurm.job / "runs").exists()
