"""Making a run: its directory first, then Slurm; a refusal leaves nothing behind."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcutils import __version__, fs, shell
from hpcutils.errors import HpcutilsError, InterruptError, SpecError
from hpcutils.launch import executor
from hpcutils.launch.held import Hold, held
from hpcutils.launch.request import Layout, Request
from hpcutils.launch.snapshot import snapshot
from hpcutils.rundir import RunDirectory, new_run_id, write_json
from hpcutils.specs.job import Job

DEFAULT_RUNS = "runs"


def runs_folder(given: str | None = None) -> Path:
    """Return the folder of all runs: `--runs`, `$HPCUTILS_RUNS`, or `runs` here. It must be on the shared file system."""
    return Path(given or os.environ.get("HPCUTILS_RUNS") or DEFAULT_RUNS).resolve()


@dataclass(frozen=True)
class Submitted:
    """A run that Slurm accepted."""

    run: RunDirectory
    job_id: str


@dataclass(frozen=True)
class Claim:
    """A run directory that is ours alone, and the folders above it that were made for it."""

    run: RunDirectory
    made: tuple[Path, ...]

    def forget(self) -> None:
        """Remove the directory, and of the folders above it those that are empty and were not there before."""
        fs.remove(self.run.path)
        for folder in self.made:
            # Not empty: another run has come.
            with contextlib.suppress(OSError):
                folder.rmdir()


def claim(runs: Path, name: str) -> Claim:
    """Make a new run directory; no other run has it, whatever the others are called.

    Raises:
        SpecError: `runs` cannot be written to.
    """
    try:
        made = tuple(folder for folder in (runs, *runs.parents) if not folder.exists())
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            run = RunDirectory(runs / new_run_id(name))
            with contextlib.suppress(FileExistsError):
                run.path.mkdir()
                return Claim(run, made)
    except OSError as exc:
        raise SpecError(
            f"no run directory can be made in {runs}: {exc.strerror}", "name a folder on the shared file system with --runs"
        ) from exc


def prepare(run: RunDirectory, job: Job, job_folder: Path, layout: Layout, image: dict[str, Any] | None) -> None:
    """Fill a new run directory with all that the ranks will read.

    Args:
        run: The directory; it is empty, or not there yet.
        job: The resolved job.
        job_folder: Folder of `train.yaml`: its code is copied, its data stays where it is.
        layout: Ranks and devices.
        image: What is known of the image (path, sha256, digest), or `None`.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    run.checkpoints.mkdir()
    run.logs.mkdir()
    code_digest = snapshot(job_folder, run.code)
    fs.write_text(run.job, job.model_dump_json(indent=2) + "\n")
    write_json(
        run.submission,
        {
            "run": run.run_id,
            "job_folder": str(job_folder),
            "submitted_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "user": getpass.getuser(),
            "host": platform.node(),
            "hpcutils": __version__,
            "code_sha256": code_digest,
            "image": image,
            "nodes": layout.nodes,
            "ranks_per_node": layout.ranks_per_node,
            "devices_per_rank": layout.devices_per_rank,
        },
    )


def submit_run(
    plan: Callable[[RunDirectory], Request],
    runs: Path,
    name: str,
    job_folder: Path,
    image: dict[str, Any] | None,
    task: Callable[[str], object],
) -> Submitted:
    """Make the run directory and submit.

    A refused run leaves no directory. Ctrl-C and SIGTERM wait until it is known whether Slurm took the job; then it is cancelled.

    Args:
        plan: Returns the request for a run directory.
        runs: Folder of all runs.
        name: What the run's id begins with.
        job_folder: Folder of `train.yaml`.
        image: What is known of the image, or `None`.
        task: What each rank runs.

    Raises:
        SlurmRejectedError: Slurm refused the request.
        SlurmUnavailableError: It did not answer.
        InterruptError: A signal came; the message says what became of the job.
    """
    with held() as hold:
        claimed = claim(runs, name)
        accepted: list[str] = []
        try:
            _submit(plan(claimed.run), job_folder, image, task, hold, accepted)
            hold.check()
        except BaseException as exc:
            if not accepted:
                claimed.forget()
                raise
            raise _called_off(accepted[0], claimed.run, exc) from exc
    return Submitted(claimed.run, accepted[0])


def _submit(
    request: Request,
    job_folder: Path,
    image: dict[str, Any] | None,
    task: Callable[[str], object],
    hold: Hold,
    accepted: list[str],
) -> None:
    run = request.run

    def note(job_id: str) -> None:
        accepted.append(job_id)
        write_json(run.path / "slurm.json", {"job_id": job_id})

    prepare(run, request.job, job_folder, request.layout, image)
    hold.check()
    executor.submit(request, task, hold, note)


def _called_off(job_id: str, run: RunDirectory, cause: BaseException) -> HpcutilsError:
    """Cancel a job that was accepted before `cause` came in between; return the error that says so."""
    why = cause.message if isinstance(cause, HpcutilsError) else f"{type(cause).__name__}: {cause}"
    cls = InterruptError if isinstance(cause, InterruptError) else HpcutilsError
    done = shell.run(["scancel", job_id], check=False, timeout_s=30)
    if done.returncode != 0:
        return cls(
            f"{why}; Slurm had accepted job {job_id}, and it could not be cancelled: {done.stderr.strip()}",
            f"cancel it with 'scancel {job_id}', or follow it in {run.path}",
        )
    return cls(f"{why}; Slurm had accepted job {job_id}: it was cancelled", f"its record is in {run.path}")
