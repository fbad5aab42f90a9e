"""The same entry point without Slurm: in this process, or over MPI ranks on this machine."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from hpcutils import shell
from hpcutils.errors import JobFailedError, MissingPartError, RequestError, by_exit_code
from hpcutils.launch.request import Layout
from hpcutils.launch.runs import claim, prepare
from hpcutils.rundir import RunDirectory, read_json
from hpcutils.specs.job import Job

# Ranks of one machine: shared memory and loopback, more ranks than cores allowed. The names differ between Open MPI 4 and 5.
LOCAL_ENVIRONMENT = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_btl_tcp_if_include": "lo",
    "OMPI_MCA_oob_tcp_if_include": "lo",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
    "PMIX_MCA_gds": "hash",
}


def local_job(job: Job, ranks: int, gpus: int | None) -> Job:
    """Return the job as one machine runs it: one node, `gpus` devices over `ranks` ranks (one each unless said otherwise)."""
    devices = ranks if gpus is None else gpus
    if devices % ranks:
        raise RequestError(
            f"--gpus {devices} does not divide by --ranks {ranks}: every rank drives the same number",
            "change one of them",
        )
    resources = job.resources.model_copy(update={"nodes": 1, "gpus": devices, "gpus_per_node": None})
    return job.model_copy(update={"resources": resources})


def run_local(job: Job, job_folder: Path, runs: Path, ranks: int) -> dict[str, Any]:
    """Train here and return the result with the run's path.

    Raises:
        HpcutilsError: Of the class that the failing rank's exit code names.
    """
    run = claim(runs, job.name).run
    layout = Layout(1, ranks, (job.resources.gpus or ranks) // ranks)
    prepare(run, job, job_folder, layout, None)
    if ranks == 1:
        _in_this_process(run)
    else:
        _over_mpi(run, ranks)
    result = read_json(run.result)
    if result is None:
        raise JobFailedError(f"run {run.run_id} ended without a result", f"see {run.path}")
    return {**result, "path": str(run.path)}


def _in_this_process(run: RunDirectory) -> None:
    # By name: the launch room plans and starts, and must not depend on what it starts.
    import importlib

    importlib.import_module("hpcutils.train.entry").run_rank(str(run.path))


def _over_mpi(run: RunDirectory, ranks: int) -> None:
    argv = [find_mpirun(), "-n", str(ranks), *_root_flag(), sys.executable, "-m", "hpcutils.train.entry", str(run.path)]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMIX_", "PMI_"))}
    try:
        shell.stream(argv, lambda line: print(line, file=sys.stderr), env=environ | LOCAL_ENVIRONMENT, error=JobFailedError)
    except JobFailedError as exc:
        failure = read_json(run.failure)
        if failure is None:
            raise
        raise by_exit_code(failure["exit_code"])(f"rank {failure['rank']}: {failure['message']}", failure["hint"]) from exc


def find_mpirun() -> str:
    """Return the mpirun that fits mpi4py: this environment's own before the system's.

    Raises:
        MissingPartError: There is none.
    """
    own = Path(sys.prefix) / "bin" / "mpirun"
    found = str(own) if own.is_file() else shutil.which("mpirun")
    if found is None:
        raise MissingPartError(
            "several ranks need mpirun, and there is none", "pip install 'hpcutils[train]', or install openmpi-bin"
        )
    return found


def _root_flag() -> list[str]:
    return ["--allow-run-as-root"] if os.geteuid() == 0 else []
