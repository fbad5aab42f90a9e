"""submitit's Slurm executor with an sbatch of our own: its time is bounded, and its answer is known at once."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor


class Sbatch(SlurmExecutor):  # type: ignore[misc]  # submitit is not looked into
    """submitit as it is, but for the call of sbatch.

    Args:
        ask: Runs the words of the sbatch command and returns what it printed.
        accepted: Called with the job's id as soon as Slurm has named it, before anything else can fail.
        submitit: Arguments of `submitit.SlurmExecutor`.
    """

    def __init__(self, *, ask: Callable[[list[str]], str], accepted: Callable[[str], None], submitit: dict[str, Any]) -> None:
        super().__init__(**submitit)
        self._ask, self._accepted = ask, accepted

    def _submit_command(self, command: str) -> Any:
        """Write the batch script, submit it and return submitit's job: what the method of submitit 1.5 does.

        That one waits for sbatch without a limit, prints its complaint, and keeps the id to itself until all files have been moved.
        """
        unique = uuid.uuid4().hex
        script = Path(self.folder) / f".submission_file_{unique}.sh"
        script.write_text(self._make_submission_file_text(command, unique))
        job_id = self._get_job_id_from_submission_command(self._ask(self._make_submission_command(script)))
        self._accepted(job_id)
        job = self.job_class(folder=self.folder, job_id=job_id, tasks=list(range(self._num_tasks())))
        job.paths.move_temporary_file(script, "submission_file", keep_as_symlink=True)
        return job
