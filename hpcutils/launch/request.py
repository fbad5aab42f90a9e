"""From a job to what Slurm is asked for: values and argument lists, no effect (`--dry-run` prints exactly these)."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from hpcutils.errors import EXIT_REQUEUE, JobFailedError, RequestError
from hpcutils.image.exec_line import MPI_ENVIRONMENT, bind, exec_argv
from hpcutils.launch.node_lines import (
    environment_lines,
    folder_lines,
    give_up_lines,
    job_folder_lines,
    own_folders,
    site_folders,
)
from hpcutils.rundir import RunDirectory
from hpcutils.specs.job import Job
from hpcutils.specs.resources import gpus_per_node, parse_time_s
from hpcutils.specs.site import Site

MAX_RESTARTS = 3
STOP_BEFORE_END_S = 90

# Set in every rank: waiting ranks must yield where ranks outnumber cores, and TensorFlow's greetings are no news.
RANK_ENVIRONMENT = {"OMPI_MCA_mpi_yield_when_idle": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}


@dataclass(frozen=True)
class Layout:
    """How ranks and devices are laid over the nodes."""

    nodes: int
    ranks_per_node: int
    devices_per_rank: int

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""
        return self.nodes * self.ranks_per_node

    @property
    def replicas(self) -> int:
        """Number of model replicas of the job."""
        return self.world_size * self.devices_per_rank


@dataclass(frozen=True)
class Request:
    """All that is asked of Slurm for one run.

    Args:
        run: The run directory, on the shared file system.
        job: The job, resolved.
        layout: Ranks and devices.
        image: The SIF, or `None` to run in this Python environment.
        python_argv: What starts Python on a node: the container's exec line, or this interpreter.
        parameters: submitit's parameters of the batch script.
    """

    run: RunDirectory
    job: Job
    layout: Layout
    image: Path | None
    python_argv: tuple[str, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)


def plan_layout(job: Job) -> Layout:
    """Return one rank a node with all its devices (`per_node`), or one rank a device (`per_gpu`)."""
    devices = gpus_per_node(job.resources)
    if job.resources.replication == "per_node":
        return Layout(job.resources.nodes, 1, devices)
    return Layout(job.resources.nodes, devices, 1)


def plan_request(
    job: Job, run: RunDirectory, image: Path | None, job_folder: Path, site: Site | None = None, variant: str = "cpu"
) -> Request:
    """Return everything that submitting `job` as `run` will ask for.

    Args:
        job: The job, checked.
        run: Where the run will live; nothing is created here.
        image: The image file; `None` runs without a container.
        job_folder: Folder of `train.yaml`, which data paths are relative to.
        site: The cluster's profile; all defaults when left out.
        variant: What kind of machine the image is for.

    Raises:
        RequestError: The job asks for more than its partition gives.
    """
    layout, profile = plan_layout(job), site or Site()
    check_limits(job, profile)
    python = plan_python(job, run, image, job_folder, profile, variant)
    folders = _named_folders(job, profile) if image is not None else []
    return Request(run, job, layout, image, python, _parameters(job, run, layout, profile, folders, image))


def plan_python(
    job: Job, run: RunDirectory, image: Path | None, job_folder: Path, site: Site, variant: str = "cpu"
) -> tuple[str, ...]:
    """Return the words that start Python in a rank."""
    # A user's own variable wins over the site's folder.
    env = {**site.container.environment, **site_folders(site, os.environ).known, **RANK_ENVIRONMENT}
    if image is None:
        variables = {**MPI_ENVIRONMENT, **env}
        return ("env", *(f"{name}={value}" for name, value in variables.items()), sys.executable)
    runs = run.path.parent
    data = _data_folders(job, job_folder) | _staging_folders(job, job_folder)
    binds = [*site.container.binds, *map(bind, _named_folders(job, site)), bind(runs)]
    binds += [bind(folder, read_only=True) for folder in sorted(data - {runs})]
    gpu = job.resources.devices == "gpu"
    return (*exec_argv(image, binds, env, gpu, program=site.container.program, variant=variant), "python3")


def check_limits(job: Job, site: Site) -> None:
    """Hold a job against what its partition gives at most.

    Raises:
        RequestError: It asks for more; Slurm might say so only after hours, by never starting it.
    """
    partition = job.resources.partition or site.launch.partition or ""
    limits = site.limits.get(partition)
    if limits is None:
        return
    asked = {
        "nodes": (job.resources.nodes, limits.nodes),
        "GPUs of each node": (gpus_per_node(job.resources), limits.gpus_per_node),
        "seconds": (parse_time_s(job.resources.time), None if limits.time is None else parse_time_s(limits.time)),
    }
    for what, (wanted, most) in asked.items():
        if most is not None and wanted > most:
            raise RequestError(
                f"{wanted} {what} were asked for, partition {partition!r} of {site.name} gives at most {most}",
                "ask for less, or name another --partition",
            )


def gpu_request(site: Site, layout: Layout, gpus: int) -> dict[str, Any]:
    """Return how Slurm is asked for `gpus` GPUs a node in the site's dialect: names as submitit's, or as sbatch's."""
    kind = "" if site.launch.gpu_type is None else f"{site.launch.gpu_type}:"
    spelled: dict[str, dict[str, Any]] = {
        "gpus-per-node": {"gpus_per_node": f"{kind}{gpus}" if kind else gpus},
        "gres": {"gres": f"gpu:{kind}{gpus}"},
        "gpus": {"gpus": f"{kind}{gpus * layout.nodes}"},
        "gpus-per-task": {"gpus-per-task": f"{kind}{layout.devices_per_rank}"},
        "none": {},
    }
    return spelled[site.launch.gpus]


def _named_folders(job: Job, site: Site) -> list[str]:
    """Return the folders that a rank writes to, beside the run's: named by the site, the user, or the job."""
    named = {**site_folders(site, os.environ).known, **own_folders()}
    folders = [*named.values(), *([job.staging.cache] if job.staging.cache is not None else [])]
    return list(dict.fromkeys(str(Path(folder).absolute()) for folder in folders))


def _data_folders(job: Job, job_folder: Path) -> set[Path]:
    """Return the folders of the data files on a file system, by path or by `file:` URL."""
    by_path = {(job_folder / file.path).resolve().parent for file in job.data.files if file.path is not None}
    by_url = {path for file in job.data.files if file.url is not None and (path := path_of_url(file.url)) is not None}
    # Opened by the name in the URL: where that is a link, both ends must be there.
    return by_path | {path.parent for path in by_url} | {path.resolve().parent for path in by_url}


def path_of_url(url: str) -> Path | None:
    """Return the path that a `file:` URL names; `None` for any other URL."""
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _staging_folders(job: Job, job_folder: Path) -> set[Path]:
    """Return the folders of the job's manifest and of what it lists."""
    manifest, source = job.staging.manifest, job.staging.source
    folders = {(job_folder / manifest).resolve().parent} if manifest is not None else set()
    if source is None:
        return folders
    local = path_of_url(source) if "://" in source else (job_folder / source).resolve()
    return folders if local is None else folders | {local}


def _parameters(job: Job, run: RunDirectory, layout: Layout, site: Site, folders: list[str], image: Path | None) -> dict[str, Any]:
    """Return submitit's parameters; names as in `submitit.SlurmExecutor.update_parameters`."""
    log = str(run.rank_log("%t"))
    gpus = gpu_request(site, layout, gpus_per_node(job.resources))
    parameters: dict[str, Any] = {
        "job_name": job.name,
        "time": -(-parse_time_s(job.resources.time) // 60),  # whole minutes: a text would break submitit's clock
        "nodes": layout.nodes,
        "ntasks_per_node": layout.ranks_per_node,
        "cpus_per_task": job.resources.cpus_per_task,
        **{name: value for name, value in gpus.items() if name == "gpus_per_node"},
        "stderr_to_stdout": True,
        "signal_delay_s": STOP_BEFORE_END_S,
        "srun_args": [
            f"--mpi={site.launch.mpi}",
            "--kill-on-bad-exit=1",
            # Since 22.05 a step no longer takes this from the batch script.
            f"--cpus-per-task={job.resources.cpus_per_task}",
            f"--output={log}",
            "--open-mode=append",
        ],
        "setup": [*_setup_lines(run), *_node_lines(run, site_folders(site, os.environ).in_job, folders, image)],
        "teardown": _teardown_lines(run),
        "additional_parameters": {
            "output": str(run.batch_log),
            # To the batch shell alone: a signal to the ranks would also reach, and end, the FUSE helper that serves their image.
            "signal": f"B:USR2@{STOP_BEFORE_END_S}",
            "requeue": True,
            "wait-all-nodes": 1,
            "chdir": str(run.path),
            **{name: value for name, value in gpus.items() if name != "gpus_per_node"},
        },
    }
    partition = job.resources.partition or site.launch.partition
    if partition is not None:
        parameters["partition"] = partition
    return parameters


def _setup_lines(run: RunDirectory) -> list[str]:
    """Lines before srun: a log folder for each (re)start with a link to the newest, and ears for Slurm's warning signal.

    bash runs a trap only between commands, or while it waits: so srun goes to the background and the shell waits for it.
    """
    logs, stop = shlex.quote(str(run.logs)), shlex.quote(str(run.stop))
    stale = shlex.join(str(path) for path in (run.stop, run.stopped, run.failure, run.result, run.exit_code))
    return [
        f'mkdir -p {logs}/"restart-${{SLURM_RESTART_COUNT:-0}}"',
        f'ln -sfn "restart-${{SLURM_RESTART_COUNT:-0}}" {logs}/current',
        # What an earlier start left: it must not speak for this one.
        f"rm -f {stale}",
        f"trap {shlex.quote(f'touch {stop}')} USR2",
        "srun() {",
        '  command srun "$@" &',
        '  while kill -0 "$!" 2>/dev/null; do wait "$!"; done',
        '  wait "$!"',
        "}",
    ]


def _node_lines(run: RunDirectory, in_job: Mapping[str, str], folders: list[str], image: Path | None) -> list[str]:
    """Lines before srun that make a node ready: folders that are known only in the job, and what a container gets to see."""
    lines = job_folder_lines(in_job)
    if image is not None:
        lines += [*folder_lines(folders, in_job), *environment_lines()]
    return [*(give_up_lines(run) if in_job or folders else []), *lines]


def _teardown_lines(run: RunDirectory) -> list[str]:
    """Lines after srun: requeue a job that stopped at a checkpoint, else leave the exit code where any host can read it.

    What the ranks wrote counts, not srun's code: as soon as one rank ends with another code than 0, srun ends the others, and
    its own code may be that of a rank which it terminated (143) on its way out.
    Requeueing happens here, on the host: `scontrol` is not to be had inside a container.
    """
    target, result, failure, stopped = (shlex.quote(str(path)) for path in (run.exit_code, run.result, run.failure, run.stopped))
    return [
        "code=$?",
        f"if [ -f {stopped} ]; then",
        f"  code={EXIT_REQUEUE}",
        f'  [ "${{SLURM_RESTART_COUNT:-0}}" -ge {MAX_RESTARTS} ] || {{ scontrol requeue "$SLURM_JOB_ID" && exit 0; }}',
        f'elif [ "$code" -ne 0 ] && [ -f {failure} ]; then',
        f"  cause=$(sed -n 's/^ *\"exit_code\": \\([0-9]*\\).*/\\1/p' {failure})",
        "  code=${cause:-$code}",
        "fi",
        # srun can end with 0 although no rank was launched: only a result is a success.
        f'if [ "$code" -eq 0 ] && [ ! -f {result} ]; then code={JobFailedError.exit_code}; fi',
        f'echo "$code" > {target}.part && mv {target}.part {target}',
        'exit "$code"',
    ]
