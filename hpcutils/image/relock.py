"""What becomes of a build whose Debian lock this machine's mirrors can no longer serve.

By default it is refused. With `--relock` the lock is renewed for this machine alone, into its cache: the image then has a digest
of its own, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from hpcutils.errors import MissingPartError
from hpcutils.fs import write_text
from hpcutils.image.debian import check_available, index_of, missing, resolve
from hpcutils.image.digest import debian_lock
from hpcutils.image.finished import renewed_before, renewed_lock, with_lock
from hpcutils.image.machine import Machine
from hpcutils.image.plan import SHORT, BuildPlan
from hpcutils.log import LOGGER
from hpcutils.specs.recipe import DebianBase


def with_usable_lock(plan: BuildPlan, machine: Machine, *, relock: bool) -> BuildPlan:
    """Return a plan whose Debian packages can be had: this one, or with `relock` one with a lock that is renewed.

    Raises:
        ImageError: Some are gone, and `relock` was not asked for.
    """
    wanted = fetched(plan)
    if not wanted:
        return plan
    recipe = plan.files.recipe
    try:
        with index_of(machine, recipe.base.suite) as index:
            gone = missing(index, wanted)
            if not gone or not relock:
                check_available(recipe.name, gone)
                return plan
            earlier = renewed_before(plan)
            if earlier is not None and not missing(index, fetched(earlier)):
                return _told(plan, earlier)
            renewed = resolve(recipe, index, debian_lock(plan.files).versions(), machine)
    except MissingPartError:
        if isinstance(recipe.base, DebianBase):
            raise
        # Without apt on this machine the build itself finds out.
        return plan
    write_text(renewed_lock(plan), f"# Renewed for this machine by 'hpcutils build --relock'.\n{renewed.text()}")
    return _told(plan, with_lock(plan, renewed_lock(plan).read_text(encoding="utf-8")))


def fetched(plan: BuildPlan) -> Mapping[str, str]:
    """Return the Debian packages that a build would fetch, with versions: none for layers that are there."""
    to_make, lock, recipe = plan.to_make(), debian_lock(plan.files), plan.files.recipe
    found = dict(lock.base) if "base" in to_make and isinstance(recipe.base, DebianBase) else {}
    if {"environment", "image"} & set(to_make):
        found |= lock.image
        found |= {} if plan.wheels.is_dir() or not recipe.compile.packages else lock.compile
    return found


def _told(plan: BuildPlan, other: BuildPlan) -> BuildPlan:
    LOGGER.warning(
        f"{plan.files.recipe.name}: THE DEBIAN LOCK CANNOT BE HAD ANY MORE from this machine's mirrors: "
        f"built with {len(other.relocked)} other packages, under digest {other.digest[:SHORT]} instead of {plan.digest[:SHORT]}"
    )
    for line in other.relocked:
        LOGGER.warning(f"  {line}")
    return other
