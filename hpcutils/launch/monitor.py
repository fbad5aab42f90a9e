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
from hpcutils.errors import (
    HpcutilsError,
    InterruptError,
    JobFailedError,
    MissingPartError,
    SlurmUnavailableError,
    SpecError,
    by_exit_code,
)
from hpcutils.rundir import RunDirectory, read_json

# Every state in which Slurm may still (re)start or finish the job; the others are ends.
ALIVE = {
    "PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
    "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "RESV_DEL_HOLD",
}  # fmt: skip
POLL_S = 0.5
SCONTROL_TIMEOUT_S = 30.0
SLURM_POLL_S = 3.0
# How long a controller may be away (a restart, a failover) before `follow` stops asking.
OUTAGE_S = 300.0
# How long a file that the batch script wrote on its node may take to be seen here: NFS looks again after some seconds.
VISIBLE_S = 10.0
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
    job_id = _job_id(run)
    code = _exit_code(run)
    if code is not None:
        return _ended(run, job_id, code)
    if job_id is None:
        raise SpecError(f"run {run.run_id} was never submitted to Slurm and has no verdict", "runs of 'hpcutils run' end with it")
    answer = _ask_slurm(job_id)
    if answer.state in ALIVE:
        return Status(run.run_id, job_id, answer.state, None, answer.reason)
    code = _awaited_exit_code(run) if answer.ran_to_its_end else _exit_code(run)
    if code is not None:
        return _ended(run, job_id, code)
    if answer.ran_to_its_end and answer.exit_code is not None:
        # The batch script ends with the very code that it writes down.
        return _ended(run, job_id, answer.exit_code)
    return Status(run.run_id, job_id, answer.state, JobFailedError.exit_code, _failure_reason(run) or answer.reason)


def _job_id(run: RunDirectory) -> str | None:
    found: str | None = (read_json(run.path / "slurm.json") or {}).get("job_id")
    return found


def _exit_code(run: RunDirectory) -> int | None:
    try:
        return int(run.exit_code.read_text())
    except FileNotFoundError:
        return None


def _awaited_exit_code(run: RunDirectory) -> int | None:
    deadline = time.monotonic() + VISIBLE_S
    while (code := _exit_code(run)) is None and time.monotonic() < deadline:
        time.sleep(POLL_S)
        # NFS remembers that a name was not there; reading the folder makes it look again.
        list(run.path.iterdir())
    return code


def _ended(run: RunDirectory, job_id: str | None, code: int) -> Status:
    if code == 0:
        return Status(run.run_id, job_id, "COMPLETED", 0)
    return Status(run.run_id, job_id, "FAILED", code, _failure_reason(run))


@dataclass(frozen=True)
class Answer:
    """What Slurm says of a job."""

    state: str
    reason: str | None = None
    exit_code: int | None = None

    @property
    def ran_to_its_end(self) -> bool:
        """Whether its batch script came to its last line: it was not cancelled, or lost with its node."""
        return self.state in ("COMPLETED", "FAILED")


def _ask_slurm(job_id: str) -> Answer:
    """Ask for a job's state; scontrol remembers a job for some minutes after its end, and then knows it no more."""
    argv = ["scontrol", "--oneliner", "show", "job", job_id]
    hint = f"ask 'scontrol ping'; job {job_id} goes on without the controller"
    try:
        said = shell.run(argv, check=False, timeout_s=SCONTROL_TIMEOUT_S, error=SlurmUnavailableError, hint=hint)
    except MissingPartError as exc:
        raise SlurmUnavailableError("no scontrol on the PATH: this is no Slurm login host", "log in to the cluster") from exc
    if said.returncode == 0:
        fields = dict(word.partition("=")[::2] for word in said.stdout.split() if "=" in word)
        reason, code = fields.get("Reason"), fields.get("ExitCode", "").partition(":")[0]
        return Answer(
            fields.get("JobState", "UNKNOWN"), None if reason in (None, "None") else reason, int(code) if code.isdigit() else None
        )
    if "Invalid job id" in said.stderr:
        return Answer("LOST", "Slurm knows the job no more, and it left no exit code: its node was lost, or it never started")
    raise SlurmUnavailableError(f"Slurm does not answer: {said.stderr.strip()}", hint)


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
    """Stream rank 0's log until the run is over and return the verdict.

    Raises:
        SlurmUnavailableError: Slurm was away for minutes.
        InterruptError: Ctrl-C; the job goes on.
    """
    try:
        return _follow(run, out)
    except KeyboardInterrupt as exc:
        raise InterruptError(
            f"interrupted; {run.run_id} (job {_job_id(run)}) goes on without being watched",
            f"'hpcutils logs {run.path} --follow' watches it again, 'hpcutils cancel {run.path}' ends it",
        ) from exc


def _follow(run: RunDirectory, out: TextIO) -> Status:
    log, questions = _Tail(run.rank_log(0)), _Questions(run, out)
    asked_at, current = -SLURM_POLL_S, Status(run.run_id, None, "PENDING")
    while True:
        # Slurm is asked seldom (a login host has many users); the exit code's file is looked at often.
        if run.exit_code.exists() or time.monotonic() - asked_at > SLURM_POLL_S:
            current = questions.ask() or current
            asked_at = time.monotonic()
        for text in log.read():
            out.write(text)
        out.flush()
        if current.is_over:
            return current
        time.sleep(POLL_S)


class _Questions:
    """Asks where a run stands, again and again: says what is new, and bears with a Slurm that is away for a while."""

    def __init__(self, run: RunDirectory, out: TextIO) -> None:
        self._run, self._out, self._said, self._away_since = run, out, "", 0.0

    def ask(self) -> Status | None:
        """Return where the run stands; `None` while Slurm does not answer.

        Raises:
            SlurmUnavailableError: It has not answered for minutes.
        """
        try:
            current = status(self._run)
        except SlurmUnavailableError as exc:
            now = time.monotonic()
            self._away_since = self._away_since or now
            if now - self._away_since > OUTAGE_S:
                raise
            self._say(f"{exc.message.splitlines()[0]}; the job goes on, asking again for {OUTAGE_S / 60:g} minutes")
            return None
        self._away_since = 0.0
        if not current.is_over:
            self._say(f"job {current.job_id} {current.state.lower()}{f' ({current.reason})' if current.reason else ''}")
        return current

    def _say(self, line: str) -> None:
        if line != self._said:
            self._out.write(f"[hpcutils] {line}\n")
            self._said = line


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
    failure: dict[str, Any] = read_json(run.failure) or {}
    # Only what a rank wrote down is one of our codes: a user's program may end with any number.
    cls = by_exit_code(failure.get("exit_code", JobFailedError.exit_code))
    hint = failure.get("hint") or f"the logs are in {run.logs}"
    return cls(f"run {run.run_id} failed: {current.reason or f'exit code {current.exit_code}'}", hint)


def cancel(run: RunDirectory) -> str:
    """Cancel a run that is not over and return a sentence about it."""
    current = status(run)
    if current.is_over or current.job_id is None:
        return f"{run.run_id} is over already: {current.state}"
    shell.run(["scancel", current.job_id], error=SlurmUnavailableError, timeout_s=SCONTROL_TIMEOUT_S)
    return f"{run.run_id}: job {current.job_id} cancelled"
