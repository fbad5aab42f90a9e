"""Carrying out a build: make the layers that are missing, test the image, and give it its name."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hpcutils
from hpcutils.errors import ImageError
from hpcutils.fs import publish, publishing, remove, temporary_beside, write_text
from hpcutils.hashing import digest_file
from hpcutils.image.digest import base_digest, environment_digest, wheels_digest
from hpcutils.image.find import find_builder, read_sidecar, sidecar_of
from hpcutils.image.layers import Workbench, make_base, make_environment, make_image, self_test, versions
from hpcutils.image.machine import Machine
from hpcutils.image.plan import SHORT, BuildPlan
from hpcutils.image.workspace import ending_on_sigterm, one_at_a_time, workspace
from hpcutils.log import LOGGER
from hpcutils.shell import run

# From how many older images of a recipe on the user is told of them.
MANY_IMAGES = 4


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


def run_build(plan: BuildPlan) -> Built:
    """Make the layers that are missing, test the image, and publish it under its name.

    Until the last moment the old image keeps the name; a build that fails, or is ended, leaves nothing but finished layers.

    Raises:
        ImageError: A layer could not be made, the self-test failed, or this user cannot build here.
        MissingPartError: A tool is not installed.
    """
    if not plan.to_make():
        return _up_to_date(plan)
    name = plan.files.recipe.name
    check_builder_rights()
    builder = find_builder()
    with ending_on_sigterm(), one_at_a_time(plan.environment.parent / f".{name}.lock", f"waiting for another build of {name}"):
        # The one that was waited for may have made it.
        to_make = plan.to_make()
        if not to_make:
            return _up_to_date(plan)
        started = time.monotonic()
        with workspace() as folder:
            bench = Workbench(builder, folder, Machine(os.environ, Path.home()))
            seconds = _make(plan, to_make, bench)
        took = round(time.monotonic() - started, 1)
        sidecar = read_sidecar(plan.image)
        LOGGER.info(f"{name}: built in {took:g} s ({', '.join(f'{layer} {s:g} s' for layer, s in seconds.items())})")
        _mention_older(plan)
        return Built(plan.image, plan.digest, sidecar["sha256"], sidecar["size_bytes"], to_make, took)


def prune(plan: BuildPlan) -> list[Path]:
    """Remove the older images and environments of the plan's recipe and return what was removed.

    Jobs that wait for an older image will miss it: nothing does this unasked.
    """
    older = older_files(plan)
    for path in older:
        remove(sidecar_of(path))
        remove(path)
    return older


def older_files(plan: BuildPlan) -> list[Path]:
    """Return the images and environments of the plan's recipe that are not the plan's own."""
    pattern = re.compile(rf"{re.escape(plan.files.recipe.name)}-[0-9a-f]{{{SHORT}}}\.sif")
    found = [*plan.image.parent.glob("*.sif"), *plan.environment.parent.glob("*.sif")]
    return sorted(path for path in found if pattern.fullmatch(path.name) and path not in (plan.image, plan.environment))


def check_builder_rights() -> None:
    """Raise `ImageError` when this user cannot build: root without all its rights, or a user without a range of ids."""
    user = os.environ.get("USER") or str(os.getuid())
    if os.geteuid() == 0:
        if not _has_all_capabilities():
            raise ImageError(
                "root cannot build images here: this machine withholds some of root's capabilities",
                "build as an ordinary user that has a range in /etc/subuid and /etc/subgid (useradd gives one)",
            )
        return
    probe = run(["unshare", "--map-root-user", "--map-auto", "true"], check=False)
    if probe.returncode != 0:
        raise ImageError(
            f"user {user} cannot have a user namespace with a range of ids: {probe.stderr.strip()}",
            f"as root: apt-get install uidmap; usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
        )


def _has_all_capabilities() -> bool:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    held = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapPrm:")), 16)
    newest = int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))
    return held == (1 << newest + 1) - 1


def _mention_older(plan: BuildPlan) -> None:
    older = older_files(plan)
    if len(older) > MANY_IMAGES:
        size_gb = sum(path.stat().st_size for path in older) / 1e9
        name = plan.files.recipe.name
        LOGGER.info(f"{len(older)} older images of {name} take {size_gb:.1f} GB; 'hpcutils build {name} --prune' removes them")


def _up_to_date(plan: BuildPlan) -> Built:
    """Let the name lead to the image that is there (it may have led to another version of the code)."""
    _link(plan)
    LOGGER.info(f"{plan.files.recipe.name}: up to date")
    sidecar = read_sidecar(plan.image)
    return Built(plan.image, plan.digest, sidecar["sha256"], sidecar["size_bytes"], (), 0.0)


def _make(plan: BuildPlan, to_make: tuple[str, ...], bench: Workbench) -> dict[str, float]:
    """Make and publish each layer in `to_make`; return how many seconds each took."""
    seconds = {}
    for layer in to_make:
        started = time.monotonic()
        LOGGER.info(f"{plan.files.recipe.name}: {layer}")
        if layer == "base":
            make_base(plan.files.recipe.base, plan.base, bench)
        elif layer == "environment":
            make_environment(plan.files, plan.base, plan.wheels, plan.environment, bench)
        else:
            _make_image(plan, bench)
        seconds[layer] = round(time.monotonic() - started, 1)
    return seconds


def _make_image(plan: BuildPlan, bench: Workbench) -> None:
    """Append the code, test the result, and only then let it be seen: file, sidecar, name."""
    with publishing(plan.image, suffix=".sif") as target:
        make_image(plan.code, plan.environment, target, bench)
        LOGGER.info("  self-test")
        report = self_test(target, plan.files.self_test, bench.builder)
        sidecar = {
            "schema": 1,
            "name": plan.files.recipe.name,
            "digest": plan.digest,
            "sha256": digest_file(target),
            "size_bytes": target.stat().st_size,
            "hpcutils": hpcutils.__version__,
            "layers": {
                "base": {"digest": base_digest(plan.files.recipe.base), **read_sidecar(plan.base)},
                "environment": {"digest": environment_digest(plan.files)},
                "wheels": {"digest": wheels_digest(plan.files)},
            },
            "tools": versions(bench.builder),
            "python": report["python"],
            "packages": report["packages"],
            "self_test": report["checks"],
        }
        # Before the image: one without a sidecar would count as unfinished, one with the old sidecar must not be seen.
        write_text(sidecar_of(plan.image), json.dumps(sidecar, indent=1) + "\n")
    _link(plan)


def _link(plan: BuildPlan) -> None:
    if plan.link.is_symlink() and plan.link.readlink().name == plan.image.name:
        return
    temporary = temporary_beside(plan.link)
    temporary.symlink_to(plan.image.name)
    try:
        publish(temporary, plan.link)
    except BaseException:
        remove(temporary)
        raise
