"""An image that is finished: what a build that has nothing to do needs to know, and imports little for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpcutils.fs import publish, remove, temporary_beside
from hpcutils.image.digest import debian_lock, environment_digest
from hpcutils.image.find import cache_folder, read_sidecar
from hpcutils.image.plan import SHORT, BuildPlan, plan_of
from hpcutils.log import LOGGER
from hpcutils.specs.debian import changes


@dataclass(frozen=True)
class Built:
    """A finished image.

    Args:
        path: The file.
        digest: Digest of all that went in.
        sha256: Digest of the file.
        size_bytes: Its size.
        made: Layers that were made for it; empty when it was up to date.
        seconds: How long that took.
    """

    path: Path
    digest: str
    sha256: str
    size_bytes: int
    made: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**vars(self), "path": str(self.path), "made": list(self.made)}


def finished(plan: BuildPlan, *, relock: bool) -> BuildPlan | None:
    """Return the plan of which the image is there: this one, or with `relock` that with the lock that was renewed here before."""
    if not plan.to_make():
        return plan
    earlier = renewed_before(plan) if relock else None
    return earlier if earlier is not None and not earlier.to_make() else None


def up_to_date(plan: BuildPlan) -> Built:
    """Let the name lead to the image that is there (it may have led to another version of the code)."""
    link(plan)
    other = f", with {len(plan.relocked)} other Debian packages than the recipe's lock" if plan.relocked else ""
    LOGGER.info(f"{plan.files.recipe.name}: up to date{other}")
    sidecar = read_sidecar(plan.image)
    return Built(plan.image, plan.digest, sidecar["sha256"], sidecar["size_bytes"], (), 0.0)


def renewed_lock(plan: BuildPlan) -> Path:
    """Return where the lock is that stands for the plan's own on this machine."""
    return cache_folder() / f"locks/{plan.files.recipe.name}-{environment_digest(plan.files)[:SHORT]}.debian.txt"


def renewed_before(plan: BuildPlan) -> BuildPlan | None:
    """Return the plan with the lock that was renewed here earlier, if it was. Starts nothing."""
    try:
        return with_lock(plan, renewed_lock(plan).read_text(encoding="utf-8"))
    except OSError:
        return None


def with_lock(plan: BuildPlan, text: str) -> BuildPlan:
    """Return the plan with another Debian lock."""
    files = replace(plan.files, debian_lock=text)
    relocked = changes(debian_lock(plan.files), debian_lock(files))
    return replace(plan_of(files, format=plan.format, force=plan.force), relocked=relocked)


def link(plan: BuildPlan) -> None:
    """Let the name lead to the plan's image."""
    if plan.link.is_symlink() and plan.link.readlink().name == plan.image.name:
        return
    temporary = temporary_beside(plan.link)
    temporary.symlink_to(plan.image.name)
    try:
        publish(temporary, plan.link)
    except BaseException:
        remove(temporary)
        raise
