"""The first thing a rank does: milliseconds of looking at what would otherwise fail in minutes, or hang without a word.

Nothing here talks to other ranks, and MPI is not started: of two that cannot understand each other, `MPI_Init` ends one silently.
That MPI counts as many ranks as the launcher is held against each other right after (`Ranks`), before TensorFlow is imported.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcutils import shell
from hpcutils.errors import DeviceError, HpcutilsError, WorldError
from hpcutils.world import World

# Since then any two versions of PMIx understand each other (their "cross-version" rule).
OLDEST_PMIX = (2, 1, 1)
# Open MPI keeps its queues between the ranks of a node there: about 4 MB a pair; Docker gives a container 64 MB in all.
SHM_BYTES_A_RANK = 16 << 20
PMIX_LIBRARIES = ("libpmix.so.2", "libpmix.so.1")
# Where pip's Open MPI and Debian's have it; the first is asked for by name alone.
PMIX_FOLDERS = ("", "/usr/lib/x86_64-linux-gnu/", "/usr/lib/x86_64-linux-gnu/pmix2/lib/", "/usr/lib64/", "/usr/local/lib/")
# Prints the version of the first library of its arguments that can be loaded; asking starts nothing.
ASK_PMIX = """
import ctypes, sys
for path in sys.argv[1:]:
    try:
        answer = ctypes.CDLL(path).PMIx_Get_version
    except (OSError, AttributeError):
        continue
    answer.restype = ctypes.c_char_p
    print((answer() or b"").decode("ascii", "replace"))
    break
"""
GPU_DEVICES = ("nvidia[0-9]*", "kfd")


@dataclass(frozen=True)
class Facts:
    """What a rank sees before it starts.

    Args:
        pmix_server: Version of the PMIx that started it; empty without one.
        pmix_client: Version of the PMIx library here; empty where none was found.
        shm_bytes: Free space in /dev/shm; `None` where it is missing or cannot be written.
        gpu_devices: Names of GPU device files.
        gpus_given: What Slurm says of GPUs on this node; empty where it says nothing.
    """

    pmix_server: str
    pmix_client: str
    shm_bytes: int | None
    gpu_devices: tuple[str, ...]
    gpus_given: str


def preflight(world: World, *, wants_gpus: bool) -> None:
    """Look, and fail at once where this rank cannot work.

    Raises:
        WorldError: Slurm's PMIx and the image's cannot talk, or the node's ranks have no shared memory.
        DeviceError: GPUs were asked for and no device of one is here.
    """
    problem = find_problem(gather_facts(os.environ), world, wants_gpus=wants_gpus)
    if problem is not None:
        raise problem


def find_problem(facts: Facts, world: World, *, wants_gpus: bool) -> HpcutilsError | None:
    """Return what keeps a rank from working, if anything does. Pure."""
    if world.world_size > 1 and facts.pmix_server and facts.pmix_client:
        old = [name for name in (facts.pmix_server, facts.pmix_client) if numbers(name) < OLDEST_PMIX]
        if old:
            return WorldError(
                f"Slurm speaks PMIx {facts.pmix_server}, the image {facts.pmix_client}; {old[0]} understands only its own",
                "build the image with the site's PMIx, or ask for 'srun --mpi=list': another plugin may fit",
            )
    needed = SHM_BYTES_A_RANK * world.local_size
    if world.local_size > 1 and (facts.shm_bytes is None or facts.shm_bytes < needed):
        there = "missing, or cannot be written" if facts.shm_bytes is None else f"{facts.shm_bytes >> 20} MiB free"
        return WorldError(
            f"/dev/shm: {there}; {world.local_size} ranks of a node need {needed >> 20} MiB",
            "run the container with the node's own /dev/shm (no --contain; Docker: --ipc=host), or clear it",
        )
    if wants_gpus and not facts.gpu_devices:
        given = f"Slurm gave it number {facts.gpus_given}" if facts.gpus_given else "Slurm gave it none"
        return DeviceError(
            f"the job asks for GPUs and this rank sees none ({given})",
            "ask for GPUs in train.yaml; in a container they need --nv or --rocm; 'devices: simulated' trains on CPUs",
        )
    return None


def gather_facts(environ: Mapping[str, str]) -> Facts:
    """Look at this process and its node."""
    given = next((environ[name] for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE") if environ.get(name)), "")
    devices = tuple(sorted(path.name for pattern in GPU_DEVICES for path in Path("/dev").glob(pattern)))
    # Under mpirun both ends of PMIx come from one Open MPI.
    client = pmix_library_version() if "SLURM_STEP_ID" in environ else ""
    return Facts(environ.get("PMIX_VERSION", ""), client, free_shm_bytes(Path("/dev/shm")), devices, given)


def free_shm_bytes(folder: Path) -> int | None:
    """Return the free space of the folder of shared memory; `None` where nothing can be put into it."""
    if not os.access(folder, os.W_OK):
        return None
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def pmix_library_version() -> str:
    """Return the version of the PMIx that MPI would load; empty where none is found.

    Another process looks: a library that is loaded here would be taken by MPI in place of its own (pip's Open MPI brings one).
    """
    words = [sys.executable, "-I", "-S", "-c", ASK_PMIX, *(folder + name for folder in PMIX_FOLDERS for name in PMIX_LIBRARIES)]
    match = re.search(r"\d+(?:\.\d+)+", shell.run(words, check=False, timeout_s=30).stdout)
    return "" if match is None else match.group()


def numbers(version: str) -> tuple[int, ...]:
    """Return a version's numbers; what is no number counts as new."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return OLDEST_PMIX if found is None else tuple(int(part) for part in found.group().split("."))
