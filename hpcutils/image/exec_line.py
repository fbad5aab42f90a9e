"""The command that runs a program inside an image. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcutils.errors import RequestError

# Each rank sits in a user namespace of its own: Open MPI cannot copy straight out of a neighbour's memory (CMA), and the
# locked files of PMIx's default store are no use between them.
MPI_ENVIRONMENT = {"OMPI_MCA_btl_vader_single_copy_mechanism": "none", "PMIX_MCA_gds": "hash"}
# Apptainer hands on the caller's variables, so these could lead Python out of the image. Empty is as good as absent.
PYTHON_ENVIRONMENT = {"PYTHONPATH": "", "PYTHONHOME": "", "PYTHONNOUSERSITE": "1"}


def exec_argv(
    image: Path | str,
    binds: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    gpu: bool = False,
    *,
    cwd: str = "/",
    program: str = "apptainer",
) -> list[str]:
    """Return the words before the program that is to run in the image.

    Shared: /tmp and /dev/shm (Open MPI, PMIx and the node's shared windows live there), /proc, /sys, the network, the devices
    and the caller's variables (the rank's number is among them). Not shared: home and working folder, unless bound.
    `--contain` and `--cleanenv` would take the first away.

    Args:
        image: The SIF.
        binds: Folders that the program sees, as `bind` gives them.
        env: Variables for the program; they win over the caller's and the image's.
        gpu: Whether NVIDIA's driver libraries and devices are handed in.
        cwd: Its working folder, as seen inside.
        program: Apptainer's name or path on the machine that runs it.
    """
    variables = {**MPI_ENVIRONMENT, **PYTHON_ENVIRONMENT, **(env or {})}
    words = [program, "--quiet", "exec", "--no-home", "--no-mount", "cwd", "--pwd", cwd]
    # Without it Apptainer lets a shell read the values: `$(…)` in one would run.
    words += ["--no-eval"]
    words += ["--nv"] if gpu else []
    words += [word for path in binds for word in ("--bind", path)]
    words += [word for name, value in variables.items() for word in ("--env", _assignment(name, value))]
    return [*words, str(image)]


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
