"""Which of a recipe's older images go: the newest few stay, and so does each that a job in the queue was submitted with."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from hpcutils.errors import HpcutilsError
from hpcutils.fs import remove
from hpcutils.image.find import sbom_of, sidecar_of
from hpcutils.image.plan import SHORT, BuildPlan
from hpcutils.log import LOGGER
from hpcutils.rundir import RunDirectory, read_json
from hpcutils.shell import run

# Beside the one that was just made. Environments are of use to builds alone.
KEPT_IMAGES = 3
KEPT_ENVIRONMENTS = 1
SQUEUE_S = 10.0


def older_files(plan: BuildPlan) -> list[Path]:
    """Return the images and environments of the plan's recipe that are not the plan's own, the newest first."""
    pattern = re.compile(rf"{re.escape(plan.files.recipe.name)}-[0-9a-f]{{{SHORT}}}(\.sif|\.oci\.tar)")
    found = [*plan.image.parent.glob("*"), *plan.environment.parent.glob("*.sif")]
    older = [path for path in found if pattern.fullmatch(path.name) and path not in (plan.image, plan.environment)]
    return sorted(older, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def surplus(older: Sequence[Path], environments: Path, in_use: Collection[Path]) -> list[Path]:
    """Return which of `older` (the newest first) are more than is kept. Pure.

    Args:
        older: A recipe's older images and environments.
        environments: Folder of the environments.
        in_use: Images that jobs in the queue were submitted with.
    """
    layers = [path for path in older if path.parent == environments]
    images = [path for path in older if path.parent != environments]
    return [path for path in images[KEPT_IMAGES:] if path not in in_use] + layers[KEPT_ENVIRONMENTS:]


def images_in_use() -> set[Path] | None:
    """Return the images of all jobs in Slurm's queue, pending and running; `None` when Slurm cannot be asked.

    A job's working folder is its run directory, which says what it was submitted with.
    """
    try:
        done = run(["squeue", "--noheader", "--format=%Z"], check=False, timeout_s=SQUEUE_S)
    except HpcutilsError:
        return None
    if done.returncode != 0:
        return None
    images = (_image_of(Path(folder)) for folder in set(done.stdout.split("\n")) if folder)
    return {image for image in images if image is not None}


def tidy(plan: BuildPlan) -> list[Path]:
    """Remove what is more than is kept, and return it; nothing is removed where nobody can say what jobs still need."""
    older = older_files(plan)
    if not surplus(older, plan.environment.parent, ()):
        return []
    in_use = images_in_use()
    if in_use is None:
        size_gb = sum(path.stat().st_size for path in older) / 1e9
        name = plan.files.recipe.name
        LOGGER.info(
            f"{len(older)} older files of {name} take {size_gb:.1f} GB, and Slurm cannot say which jobs need them; "
            f"'hpcutils build {name} --prune' removes them"
        )
        return []
    return _removed(surplus(older, plan.environment.parent, in_use))


def prune(plan: BuildPlan) -> list[Path]:
    """Remove all older images and environments of the plan's recipe but those of jobs in the queue; return what was removed."""
    in_use = images_in_use() or set()
    return _removed([path for path in older_files(plan) if path not in in_use])


def _removed(paths: list[Path]) -> list[Path]:
    for path in paths:
        # The sidecar last but one: an image without one counts as unfinished, a sidecar without an image says nothing.
        for file in (sbom_of(path), sidecar_of(path), path):
            remove(file)
        LOGGER.info(f"removed {path}")
    return paths


def _image_of(folder: Path) -> Path | None:
    try:
        submission = read_json(RunDirectory(folder).submission)
    except (OSError, ValueError):
        return None
    image = (submission or {}).get("image") or {}
    return Path(image["path"]) if image.get("path") else None
