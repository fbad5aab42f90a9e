"""`provenance.json`: what one must know to run the same again. A run that fails has what was known until then."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

from hpcutils import __version__
from hpcutils.rundir import RunDirectory, write_json
from hpcutils.staging.items import Staged
from hpcutils.train.ranks import Ranks
from hpcutils.world import World

SLURM_VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_PARTITION", "SLURM_RESTART_COUNT")


class Provenance:
    """The record of a run, written anew by rank 0 as soon as more is known.

    Args:
        run: Where it is written.
        world: This rank; the others write nothing.
        submission: What was submitted.
    """

    def __init__(self, run: RunDirectory, world: World, submission: Mapping[str, Any]) -> None:
        self._run, self._writes = run, world.rank == 0
        self._known: dict[str, Any] = {
            "submission": dict(submission),
            "image": submission["image"],
            "code_sha256": submission["code_sha256"],
            "data": {},
            "versions": {"hpcutils": __version__, "python": platform.python_version()},
            "slurm": {name.lower(): os.environ.get(name) for name in SLURM_VARIABLES},
            "complete": False,
        }
        self._write()

    def add_data(self, staged: Mapping[str, Staged], staging: list[dict[str, Any]]) -> None:
        """Add the digests of the data, and what staging them took."""
        self._known |= {"data": {name: file.sha256 for name, file in staged.items()}, "staging": staging}
        self._write()

    def add_versions(self, ranks: Ranks) -> None:
        """Add the versions of what has been imported by now."""
        self._known["versions"] |= loaded_versions() | {"mpi": _mpi_version(ranks)}
        self._write()

    def complete(self, reducer: str) -> None:
        """Say that the run came to its end, and what averaged its gradients."""
        self._known["versions"]["reducer"] = reducer
        self._known["complete"] = True
        self._write()

    def _write(self) -> None:
        if self._writes:
            write_json(self._run.provenance, self._known)


def loaded_versions() -> dict[str, str]:
    """Return the versions of the packages that decide a result, of those that this process has loaded."""
    loaded = {name: sys.modules.get(name) for name in ("tensorflow", "keras", "numpy", "h5py")}
    versions = {name: str(module.__version__) for name, module in loaded.items() if module is not None}
    h5py = loaded["h5py"]
    return versions if h5py is None else versions | {"hdf5": str(h5py.version.hdf5_version)}


def _mpi_version(ranks: Ranks) -> str | None:
    if ranks.comm is None:
        return None
    from mpi4py import MPI

    return str(MPI.Get_library_version().split(",")[0].strip())
