"""From a command line to a plan: what `submit --dry-run` shows and `submit` then does."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from hpcutils import shell
from hpcutils.errors import DataError
from hpcutils.image.find import Image
from hpcutils.image.listing import known_image
from hpcutils.image.trust import verify
from hpcutils.launch.executor import batch_script
from hpcutils.launch.request import Request, plan_request
from hpcutils.launch.runs import Submitted, runs_folder, submit_run
from hpcutils.rundir import RunDirectory, new_run_id
from hpcutils.specs.job import Job, load_job
from hpcutils.specs.resources import gpus_per_node
from hpcutils.specs.site import Site, load_site

Overrides = Mapping[tuple[str | int, ...], tuple[str, Any]]


@dataclass(frozen=True)
class Plan:
    """A job that could be submitted now.

    Args:
        request: What Slurm will be asked, for a run directory of an id that may still change.
        request_for: The same for the run directory that was made.
        job_folder: Folder of train.yaml.
        image: The image, or `None`.
        data_argv: The command that makes missing data first, or `None` when all is there.
    """

    request: Request
    request_for: Callable[[RunDirectory], Request]
    job_folder: Path
    image: Image | None
    data_argv: tuple[str, ...] | None

    def make_data(self) -> None:
        """Run the job's own data script if files are missing."""
        if self.data_argv is not None:
            make_data(self.data_argv, self.request.job, self.job_folder)

    def submit(self, task: Callable[[str], object]) -> Submitted:
        """Make the run directory and submit `task`."""
        runs, name = self.request.run.path.parent, self.request.job.name
        return submit_run(self.request_for, runs, name, self.job_folder, self.image_record(), task)

    def commands(self) -> list[str]:
        """Return what `submit` will run on this host, in this order."""
        run = self.request.run
        made = [] if self.data_argv is None else [shlex.join(self.data_argv)]
        return [*made, f"mkdir -p {run.path}", f"sbatch {run.submitit}/submission_file_<unique>.sh"]

    def as_dict(self) -> dict[str, Any]:
        """Return what `submit` would do, for a program."""
        request = self.request
        return {
            "run": request.run.run_id,
            "path": str(request.run.path),
            "layout": asdict(request.layout),
            "image": None if request.image is None else str(request.image),
            "commands": self.commands(),
            "script": batch_script(request),
        }

    def describe(self) -> str:
        """Return what `submit` would do, for a person: the commands and the batch script."""
        layout = self.request.layout
        head = [
            f"# run       {self.request.run.run_id}",
            f"# layout    {layout.nodes} nodes x {layout.ranks_per_node} ranks x {layout.devices_per_rank} devices",
            f"# image     {self.request.image or 'none: this Python environment'}",
            "# commands  on this host, in this order",
            *(f"#   {command}" for command in self.commands()),
            "# script    as sbatch gets it",
            "",
        ]
        return "\n".join(head) + batch_script(self.request).rstrip()

    def image_record(self) -> dict[str, Any] | None:
        """Return what the run's record says of the image."""
        image = self.image
        if image is None:
            return None
        return {"name": image.name, "path": str(image.path), "sha256": image.sha256, "digest": image.digest or None}


def plan(job_file: Path, overrides: Overrides, image_name: str | None, runs: str | None) -> Plan:
    """Check everything that can be checked here and return the plan; nothing is written."""
    job, site = load_job(job_file, overrides), load_site()
    folder = job_file.resolve().parent
    name = image_name or job.image
    gpus_per_node(job.resources)  # what cannot be laid out is said before an image is looked for
    run = RunDirectory(runs_folder(runs) / new_run_id(job.name))
    image = checked_image(name, site) if name is not None else None
    variant = image.sidecar.get("variant", "cuda") if image is not None else "cpu"
    path = image.path if image is not None else None

    def request_for(run: RunDirectory) -> Request:
        return plan_request(job, run, path, folder, site, variant)

    return Plan(request_for(run), request_for, folder, image, data_argv(job, folder))


def checked_image(name: str, site: Site) -> Image:
    """Return the image called `name`: the very file that was built or published, with the site's signature where it has one.

    Raises:
        ImageError: There is none, it was withdrawn, or it was altered.
    """
    image, published = known_image(name, site)
    return replace(image, sha256=verify(image, published, name, site=site).sha256)


def data_argv(job: Job, folder: Path) -> tuple[str, ...] | None:
    """Return the command that makes the job's data, when a file is missing and the job says how."""
    missing = [file.path for file in job.data.files if file.path is not None and not (folder / file.path).is_file()]
    return (sys.executable, str(folder / job.data.make)) if missing and job.data.make is not None else None


def make_data(argv: tuple[str, ...], job: Job, folder: Path) -> None:
    """Run the data script in its folder.

    Raises:
        DataError: It failed, or did not make what train.yaml names.
    """
    click.echo(f"making the data: {shlex.join(argv)}", err=True)
    done = shell.run(list(argv), cwd=folder, check=False)
    if done.returncode != 0:
        raise DataError(f"{argv[-1]} failed with exit code {done.returncode}:\n{done.stderr.strip()}", "run it by hand to see more")
    missing = [file.path for file in job.data.files if file.path is not None and not (folder / file.path).is_file()]
    if missing:
        raise DataError(f"{argv[-1]} did not make {', '.join(missing)}", "it runs in the folder of train.yaml")
