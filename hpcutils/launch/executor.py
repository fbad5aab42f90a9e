"""The door to submitit: it writes the batch script, pickles the task and calls sbatch."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcutils import shell
from hpcutils.errors import HpcutilsError, InterruptError, SlurmRejectedError, SlurmUnavailableError
from hpcutils.launch.held import Hold
from hpcutils.launch.request import Request

if TYPE_CHECKING:
    from hpcutils.launch.sbatch import Sbatch

# Slurm's own commands give up after 10 s (MessageTimeout) and some tries; a hanging file system or PAM module never does.
SBATCH_TIMEOUT_S = 60.0
# How long sbatch may still take to name the job when Ctrl-C was pressed.
INTERRUPT_GRACE_S = 5.0

# Slurm's own sentences for a controller or a munge that is not there (slurm_errno.c and the commands' network layer).
NO_ANSWER = re.compile(
    r"unable to (contact|establish)|connect failure|connection (refused|reset|timed out)|socket timed out|send/recv|zero bytes"
    r"|no route to host|protocol authentication|munge|standby mode",
    re.IGNORECASE,
)
NO_PARTITION = re.compile(r"invalid partition (name )?specified|invalid partition name", re.IGNORECASE)


def batch_script(request: Request) -> str:
    """Return the text that sbatch is given, byte for byte.

    Raises:
        SlurmUnavailableError: No Slurm client on this machine.
    """
    executor = _executor(request, Hold(), lambda job_id: None)
    # submitit has no public way to show a script without submitting it; the real path calls this same method.
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def submit(request: Request, task: Callable[[str], object], hold: Hold, accepted: Callable[[str], None]) -> None:
    """Submit `task(run directory)`.

    Args:
        request: What is asked for; its run directory is there.
        task: A small importable function.
        hold: Signals that arrive meanwhile: sbatch gets some seconds to end by itself, for it alone knows the job's id.
        accepted: Called with Slurm's job id at once; whatever is raised afterwards, the job is in the queue.

    Raises:
        SlurmRejectedError: Slurm refused the request.
        SlurmUnavailableError: No answer, or none in time.
        InterruptError: A signal came, and sbatch had not answered.
    """
    executor = _executor(request, hold, accepted)
    from submitit.core.utils import FailedSubmissionError

    try:
        executor.submit(task, str(request.run.path))
    except FailedSubmissionError as exc:
        raise SlurmRejectedError(f"sbatch ended well and named no job: {exc}", "look with 'squeue --me'") from exc
    keep_script(request)


def _executor(request: Request, hold: Hold, accepted: Callable[[str], None]) -> Sbatch:
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise SlurmUnavailableError("no sbatch or srun on the PATH: this machine is no Slurm login host", _NO_SLURM_HINT)
    from hpcutils.launch.sbatch import Sbatch

    # The interpreter goes unquoted into the srun line.
    submitit = {"folder": request.run.submitit, "python": shlex.join(request.python_argv), "max_num_timeout": 0}
    executor = Sbatch(ask=lambda argv: _ask(argv, request, hold), accepted=accepted, submitit=submitit)
    executor.update_parameters(**request.parameters)
    return executor


_NO_SLURM_HINT = "log in to the cluster, start the sandbox ('slurm/sandbox up'), or train here: 'hpcutils run train.yaml'"


def _ask(argv: list[str], request: Request, hold: Hold) -> str:
    """Run sbatch and return what it said; a job that it has not named yet could be neither followed nor cancelled."""
    # The controller may still take a request whose sender is gone. Without its folder such a job ends where it starts.
    late = f"Slurm may have taken the job after all: look with 'squeue --me --name={request.job.name}'"
    try:
        done = shell.run(
            argv,
            timeout_s=SBATCH_TIMEOUT_S,
            give_up=lambda: hold.is_pressing(INTERRUPT_GRACE_S),
            check=False,
            error=SlurmUnavailableError,
            hint=late,
        )
    except SlurmUnavailableError as exc:
        if hold.count:
            raise InterruptError("interrupted: sbatch had not answered yet", late) from exc
        raise
    if done.returncode != 0:
        raise translate(done.stderr or done.stdout, request)
    return done.stdout


def keep_script(request: Request) -> None:
    """Give the submitted script its name in the run directory."""
    for script in Path(request.run.submitit).glob("*_submission.sh"):
        shutil.copyfile(script, request.run.sbatch)


def translate(said: str, request: Request | Any) -> HpcutilsError:
    """Turn sbatch's complaint into one of ours."""
    lines = [line.strip() for line in said.splitlines() if "error" in line.lower()]
    reason = "; ".join(dict.fromkeys(line.partition("error: ")[2] or line for line in lines)) or said.strip()
    if NO_ANSWER.search(reason):
        return SlurmUnavailableError(
            f"Slurm does not answer: {reason}", "ask 'scontrol ping'; the controller may be down or restarting"
        )
    partition = request.parameters.get("partition")
    where = f"partition {partition!r}" if partition is not None else "the cluster's default partition"
    if NO_PARTITION.search(reason):
        said = f"Slurm knows no {where}" if partition is not None else "the cluster has no default partition"
        return SlurmRejectedError(f"{said}: {reason}", "see 'sinfo -s' for the partitions that you may use")
    return SlurmRejectedError(
        f"Slurm refused the job ({where}): {reason}",
        "compare the request ('--dry-run') with 'sinfo -Nel' and 'scontrol show partition'",
    )
