"""The command that runs a program inside an image. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from hpcutils.errors import RequestError

# Each rank sits in a user namespace of its own: Open MPI cannot copy straight out of a neighbour's memory (CMA), and the
# locked files of PMIx's default store are no use between them.
MPI_ENVIRONMENT = {"OMPI_MCA_btl_vader_single_copy_mechanism": "none", "PMIX_MCA_gds": "hash"}
# Apptainer hands on the caller's variables, so these could lead Python out of the image. Empty is as good as absent.
PYTHON_ENVIRONMENT = {"PYTHONPATH": "", "PYTHONHOME": "", "PYTHONNOUSERSITE": "1"}
# Slurm confines a job to its own devices; of those, all.
ENROOT_GPU = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
GPU_FLAGS = {"cuda": "--nv", "rocm": "--rocm"}

# Apptainer and Pyxis hand on whatever they are started with; `--cleanenv` would take PMI's variables away, too. So what they are
# started with is cut down to this (patterns of a shell): who and where the user is, what Slurm, PMI and Apptainer say, which
# devices are the job's, how the network's libraries are tuned here. Anything else (LD_PRELOAD, KERAS_BACKEND, OMPI_*, PYTHON*)
# would make an image behave in one way for one user and in another for the next; what a site needs is in site.toml,
# container.environment.
PASSED_ON = (
    *("HOME", "USER", "LOGNAME", "SHELL", "PATH", "LD_LIBRARY_PATH", "PWD", "TMPDIR", "TERM", "LANG", "LC_*", "TZ"),
    *("SLURM_*", "SLURMD_*", "PMI_*", "PMI2_*", "PMIX_*", "MUNGE*", "KRB5CCNAME", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"),
    *("APPTAINER*", "SINGULARITY*", "ENROOT_*", "HPCUTILS_*", "SUBMITIT_*"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_MPS_*", "NVIDIA_*", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"),
    *("UCX_*", "FI_*", "NCCL_*", "RCCL_*", "PSM2_*", "HFI_*", "MLX5_*"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
)

# Docker hands on none of the caller's variables: these say which rank a process is, and how it reaches the others.
RANK_VARIABLES = (
    *("SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST", "SLURM_NNODES", "SLURM_JOB_PARTITION", "SUBMITIT_EXECUTOR"),
    *("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK"),
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURMD_NODENAME"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_STEP_TASKS_PER_NODE", "SLURM_RESTART_COUNT"),
    *("PMIX_NAMESPACE", "PMIX_RANK", "PMIX_SERVER_URI2", "PMIX_SERVER_URI21", "PMIX_SERVER_URI3", "PMIX_SERVER_URI4"),
    *("PMIX_SERVER_URI41", "PMIX_SECURITY_MODE", "PMIX_PTL_MODULE", "PMIX_BFROP_BUFFER_TYPE", "PMIX_GDS_MODULE"),
    *("PMIX_SERVER_TMPDIR", "PMIX_SYSTEM_TMPDIR", "PMIX_DSTORE_ESH_BASE_PATH", "PMIX_HOSTNAME", "PMIX_VERSION"),
    *("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
)


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what of the caller's environment a container gets to see."""
    return {name: value for name, value in environ.items() if any(fnmatchcase(name, pattern) for pattern in PASSED_ON)}


def exec_argv(
    image: Path | str,
    binds: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    gpu: bool = False,
    *,
    cwd: str = "/",
    program: str = "apptainer",
    variant: str = "cuda",
) -> list[str]:
    """Return the words before the program that is to run in the image.

    Shared: /tmp and /dev/shm (Open MPI, PMIx and the node's shared windows live there), /proc, /sys, the network, the devices
    and the caller's variables (the rank's number is among them). Not shared: home and working folder, unless bound.
    `--contain` and `--cleanenv` would take the first away.

    Args:
        image: The SIF.
        binds: Folders that the program sees, as `bind` gives them.
        env: Variables for the program; they win over the caller's and the image's.
        gpu: Whether the GPUs' driver libraries and devices are handed in.
        cwd: Its working folder, as seen inside.
        program: Apptainer's name or path on the machine that runs it.
        variant: Whose GPUs the image is for: `rocm`, or `cuda`, which is NVIDIA's.
    """
    variables = {**MPI_ENVIRONMENT, **PYTHON_ENVIRONMENT, **(env or {})}
    words = [program, "--quiet", "exec", "--no-home", "--no-mount", "cwd", "--pwd", cwd]
    # Without it Apptainer lets a shell read the values: `$(…)` in one would run.
    words += ["--no-eval"]
    words += [GPU_FLAGS.get(variant, "--nv")] if gpu else []
    words += [word for path in binds for word in ("--bind", path)]
    words += [word for name, value in variables.items() for word in ("--env", _assignment(name, value))]
    return [*words, str(image)]


def docker_argv(
    image: str,
    binds: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    gpu: bool = False,
    *,
    user: str,
    cwd: str = "/",
    program: str = "docker",
    variant: str = "cuda",
) -> list[str]:
    """Return the words before the program that is to run in an image of Docker's or Podman's, as `exec_argv` does for a SIF.

    The same is shared: /tmp, /dev/shm, the network, and processes see each other, as MPI ranks of one node have to.

    Args:
        image: Its name.
        binds: As `bind` gives them.
        env: Variables for the program; they win over the caller's and the image's.
        gpu: Whether the GPUs are handed in.
        user: `UID:GID` of the caller: files that it writes are its own.
        cwd: Its working folder, as seen inside.
        program: `docker` or `podman`.
        variant: Whose GPUs the image is for.
    """
    variables = {**MPI_ENVIRONMENT, **PYTHON_ENVIRONMENT, **(env or {})}
    words = [program, "run", "--rm", "--network=host", "--ipc=host", "--pid=host", f"--workdir={cwd}"]
    # Podman's root is the caller already; as itself it would be nobody there.
    words += ["--userns=keep-id"] if program == "podman" else [f"--user={user}"]
    words += _docker_gpu(program, variant) if gpu else []
    words += [word for path in ("/tmp:/tmp", *binds) for word in ("--volume", path)]
    # A name without a value: the caller's, where there is one.
    words += [word for name in RANK_VARIABLES if name not in variables for word in ("--env", name)]
    words += [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
    return [*words, image]


def _docker_gpu(program: str, variant: str) -> list[str]:
    if variant == "rocm":
        return ["--device=/dev/kfd", "--device=/dev/dri", "--group-add=video"]
    return ["--device=nvidia.com/gpu=all"] if program == "podman" else ["--gpus=all"]


def pyxis_options(
    image: str,
    binds: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    gpu: bool = False,
    *,
    cwd: str = "/",
    variant: str = "cuda",
) -> tuple[list[str], dict[str, str]]:
    """Return what srun needs to start its tasks in an image by the Pyxis plugin: options, and variables to set for srun.

    Pyxis hands on srun's variables, and GPUs where Slurm gives them; `--container-env` lets ours win over the image's.

    Args:
        image: A squashfs of enroot's, or `docker://registry#name:tag`.
        binds: As `bind` gives them.
        env: Variables for the program.
        gpu: Whether the GPUs' driver libraries and devices are handed in: enroot's hook does it where these variables ask for it.
        cwd: Its working folder, as seen inside.
        variant: Whose GPUs the image is for.

    Raises:
        RequestError: A folder has a comma in its name, which Pyxis takes for the next one.
    """
    variables = {**MPI_ENVIRONMENT, **PYTHON_ENVIRONMENT, **(env or {})}
    if gpu and variant != "rocm":
        variables = {**ENROOT_GPU, **variables}
    mounts = ["/tmp:/tmp", *binds]
    wrong = next((path for path in mounts if "," in path), None)
    if wrong is not None:
        raise RequestError(f"{wrong!r} cannot be mounted by Pyxis: it has a comma in it")
    options = [f"--container-image={image}", f"--container-mounts={','.join(mounts)}", f"--container-workdir={cwd}"]
    options += ["--no-container-mount-home", "--no-container-entrypoint", f"--container-env={','.join(variables)}"]
    return options, variables


def bind(source: Path | str, target: Path | str | None = None, *, read_only: bool = False) -> str:
    """Return how Apptainer is told to show a folder (or file) of this machine inside.

    Args:
        source: Its absolute path here.
        target: Its path inside; the same when left out.
        read_only: Whether it is protected.

    Raises:
        RequestError: The path has a character that Apptainer takes for its own.
    """
    inside = str(source if target is None else target)
    for path in (str(source), inside):
        if not path.startswith("/") or any(mark in path for mark in ',:\\\n"'):
            raise RequestError(f'{path!r} cannot be bound into an image: an absolute path without , : \\ or " was expected')
    return f"{source}:{inside}" + (":ro" if read_only else "")


def _assignment(name: str, value: str) -> str:
    """`--env` takes an argument with one `=` as it is, but for quotes at its end, and reads any other as a line of CSV."""
    pair = f"{name}={value}"
    if "=" not in value:
        if value.endswith('"'):
            raise RequestError(f"{name}: a value that ends with a quote and has no '=' cannot be handed to Apptainer")
        return pair
    if any(mark in value for mark in ',"\n'):
        return '"' + pair.replace('"', '""') + '"'
    return pair
