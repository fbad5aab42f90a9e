"""What a run is doing: asked of Slurm without `sacct` (many sites have none), and of the files that the run leaves."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from hpcutils import shell
from hpcutils.errors import HpcutilsError, JobFailedError, SlurmUnavailableError, SpecError, by_exit_code
from hpcutils.rundir import RunDirectory, read_json

# Every state in which Slurm may still (re)start or finish the job; the others are ends.
ALIVE = {
    "PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
    "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "RESV_DEL_HOLD",
}  # fmt: skip
POLL_S = 0.5
SLURM_POLL_S = 3.0
# `srun: error: node2: task 3: Killed`, `…: tasks 4-7: Exited with exit code 1`
TASK_ENDED = re.compile(r"^srun: error: (?P<node>[^:\s]+): tasks? (?P<tasks>[\d,-]+): (?P<how>.+)$", re.MULTILINE)
SIGNALS = {"Killed": "SIGKILL", "Terminated": "SIGTERM", "Segmentation fault": "SIGSEGV", "Aborted": "SIGABRT"}


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Args:
        state: Slurm's word (`RUNNING`, …), `COMPLETED`, `FAILED`, or `LOST` when nobody knows the job any more.
        exit_code: The job's, once it is over.
        reason: Why it waits or failed.
    """

    run_id: str
    job_id: str | None
    state: str
    exit_code: int | None = None
    reason: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state not in ALIVE


def status(run: RunDirectory) -> Status:
    """Return where a run stands now.

    Raises:
        SlurmUnavailableError: The run's own files do not settle it and Slurm does not answer.
    """
    job_id = (read_json(run.path / "slurm.json") or {}).get("job_id")
    code = _exit_code(run)
    if code is not None:
        return _ended(run, job_id, code)
    if job_id is None:
        raise SpecError(f"run {run.run_id} was never submitted to Slurm and has no verdict", "runs of 'hpcutils run' end with it")
    state, reason = _ask_slurm(job_id)
    if state in ALIVE:
        return Status(run.run_id, job_id, state, None, reason)
    code = _exit_code(run)
    if code is not None:
        return _ended(run, job_id, code)
    return Status(run.run_id, job_id, state, JobFailedError.exit_code, _failure_reason(run) or reason)


def _exit_code(run: RunDirectory) -> int | None:
    try:
        return int(run.exit_code.read_text())
    except FileNotFoundError:
        return None


def _ended(run: RunDirectory, job_id: str | None, code: int) -> Status:
    if code == 0:
        return Status(run.run_id, job_id, "COMPLETED", 0)
    return Status(run.run_id, job_id, "FAILED", code, _failure_reason(run))


def _ask_slurm(job_id: str) -> tuple[str, str | None]:
    """Return Slurm's state and reason; scontrol remembers a job for some minutes after its end, and then knows it no more."""
    answer = shell.run(["scontrol", "--oneliner", "show", "job", job_id], check=False, timeout_s=30)
    if answer.returncode == 0:
        fields = dict(word.partition("=")[::2] for word in answer.stdout.split() if "=" in word)
        reason = fields.get("Reason")
        return fields.get("JobState", "UNKNOWN"), None if reason in (None, "None") else reason
    if "Invalid job id" in answer.stderr:
        return (
            "LOST",
            "Slurm knows the job no more, and it left no exit code: its node was lost, or it never started",
        )
    raise SlurmUnavailableError(f"Slurm does not answer: {answer.stderr.strip()}", "ask 'scontrol ping'")


def _failure_reason(run: RunDirectory) -> str | None:
    """Return the first cause: what a rank wrote of itself, else what srun saw of a rank that could not."""
    failure = read_json(run.failure)
    if failure is not None:
        # Before srun there is no rank yet.
        rank = "" if failure["rank"] is None else f"rank {failure['rank']} on "
        return f"{rank}{failure['node']}: {failure['message']}"
    killed = rank_deaths(run.batch_log.read_text(errors="replace")) if run.batch_log.is_file() else []
    return killed[0] if killed else _last_error_line(run)


def rank_deaths(batch_log: str) -> list[str]:
    """Return a sentence for each task that srun saw dying, the cause first: srun itself terminates the tasks that were left."""
    sentences = []
    deaths = sorted(TASK_ENDED.finditer(batch_log), key=lambda match: match["how"] == "Terminated")
    for match in deaths:
        how = match["how"].removesuffix(" (core dumped)")
        by = f"was killed by signal {signal.Signals[SIGNALS[how]].value} ({SIGNALS[how]})" if how in SIGNALS else f"ended: {how}"
        sentences.append(f"rank {match['tasks']} on {match['node']} {by}")
    return sentences


def _last_error_line(run: RunDirectory) -> str | None:
    for log in (run.batch_log, run.rank_log(0)):
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
        if errors:
            return errors[-1]
    return None


def follow(run: RunDirectory, out: TextIO) -> Status:
    """Stream rank 0's log until the run is over and return the verdict."""
    log = _Tail(run.rank_log(0))
    said, asked_at, current = "", 0.0, Status(run.run_id, None, "PENDING")
    while True:
        # Slurm is asked seldom (a login host has many users); the exit code's file is looked at often.
        if run.exit_code.exists() or time.monotonic() - asked_at > SLURM_POLL_S:
            current, asked_at = status(run), time.monotonic()
            waiting = f"{current.state.lower()}{f' ({current.reason})' if current.reason and not current.is_over else ''}"
            if waiting != said and not current.is_over:
                out.write(f"[hpcutils] job {current.job_id} {waiting}\n")
                said = waiting
        for text in log.read():
            out.write(text)
        out.flush()
        if current.is_over:
            return current
        time.sleep(POLL_S)


class _Tail:
    """What has been added to a file since the last look, through a link that may move to a newer file."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen, self.inode = path, 0, -1

    def read(self) -> Iterator[str]:
        try:
            stream = self.path.open(encoding="utf-8", errors="replace", newline="")
        except FileNotFoundError:
            return
        with stream:
            inode = self.path.stat().st_ino
            if inode != self.inode:
                self.seen, self.inode = 0, inode
            stream.seek(self.seen)
            yield stream.read()
            self.seen = stream.tell()


def verdict_error(current: Status, run: RunDirectory) -> HpcutilsError | None:
    """Return the error that a finished run ended with, of the class that its exit code names; `None` for a success."""
    if current.exit_code == 0:
        return None
    cls = by_exit_code(current.exit_code or JobFailedError.exit_code)
    failure: dict[str, Any] = read_json(run.failure) or {}
    hint = failure.get("hint") or f"the logs are in {run.logs}"
    return cls(f"run {run.run_id} failed: {current.reason or f'exit code {current.exit_code}'}", hint)


def cancel(run: RunDirectory) -> str:
    """Cancel a run that is not over and return a sentence about it."""
    current = status(run)
    if current.is_over or current.job_id is None:
        return f"{run.run_id} is over already: {current.state}"
    shell.run(["scancel", current.job_id], error=SlurmUnavailableError, timeout_s=30)
    return f"{run.run_id}: job {current.job_id} cancelled"
