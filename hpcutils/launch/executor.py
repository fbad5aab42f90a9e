"""The only door to submitit: it writes the batch script, pickles the task and calls sbatch."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcutils.errors import HpcutilsError, SlurmRejectedError, SlurmUnavailableError
from hpcutils.launch.request import Request

if TYPE_CHECKING:
    from submitit import SlurmExecutor

NO_ANSWER = re.compile(r"unable to contact|connection refused|timed? out|socket|protocol authentication|munge", re.IGNORECASE)


def batch_script(request: Request) -> str:
    """Return the text that sbatch is given, byte for byte.

    Raises:
        SlurmUnavailableError: No Slurm client on this machine.
    """
    executor = _executor(request)
    # submitit has no public way to show a script without submitting it; the real path calls this same method.
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def submit(request: Request, task: Callable[[str], object]) -> str:
    """Submit `task(run directory)` and return Slurm's job id.

    Raises:
        SlurmRejectedError: Slurm refused the request.
        SlurmUnavailableError: No answer.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = _executor(request)
    try:
        # submitit renames the pickled task after sbatch has answered: an interrupt between the two would lose the job.
        with _uninterrupted():
            job = executor.submit(task, str(request.run.path))
    except (FailedJobError, FailedSubmissionError) as exc:
        raise translate(str(exc), request) from exc
    _keep_script(request)
    return str(job.job_id)


def _executor(request: Request) -> SlurmExecutor:
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise SlurmUnavailableError("no sbatch or srun on the PATH: this machine is no Slurm login host", _NO_SLURM_HINT)
    from submitit import SlurmExecutor

    # The interpreter goes unquoted into the srun line.
    executor = SlurmExecutor(folder=request.run.submitit, python=shlex.join(request.python_argv), max_num_timeout=0)
    executor.update_parameters(**request.parameters)
    return executor


_NO_SLURM_HINT = "log in to the cluster, start the sandbox ('slurm/sandbox up'), or train here: 'hpcutils run train.yaml'"


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM until the block is done; they arrive then."""
    held = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _keep_script(request: Request) -> None:
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
    partition = request.job.resources.partition
    if "partition" in reason.lower():
        return SlurmRejectedError(
            f"Slurm knows no partition {partition!r}: {reason}", "see 'sinfo -s' for the partitions that you may use"
        )
    return SlurmRejectedError(
        f"Slurm refused the job: {reason}",
        "compare the request ('--dry-run') with 'sinfo -Nel' and 'scontrol show partition'",
    )
