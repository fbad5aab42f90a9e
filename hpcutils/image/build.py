"""Carrying out a build: make the layers that are missing, test the image, and give it its name."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hpcutils
from hpcutils.errors import ImageError
from hpcutils.fs import fsync_path, publishing, remove, write_text
from hpcutils.hashing import digest_file
from hpcutils.image.builders import Finding, check_builder_rights, choose, explain, gather_facts, look_for_builders
from hpcutils.image.caller import plain_environment
from hpcutils.image.digest import base_digest, debian_lock, environment_digest, wheels_digest
from hpcutils.image.exec_line import exec_argv
from hpcutils.image.find import read_sidecar, sbom_of, sidecar_of
from hpcutils.image.finished import Built, link, up_to_date
from hpcutils.image.layers import Workbench, check_versions, make_base, make_environment, make_image, versions
from hpcutils.image.machine import network, this_machine
from hpcutils.image.oci import Engine, entering, make_oci
from hpcutils.image.plan import SUFFIXES, BuildPlan
from hpcutils.image.relock import with_usable_lock
from hpcutils.image.retention import tidy
from hpcutils.image.sbom import cyclonedx
from hpcutils.image.selftest import TEST_ENVIRONMENT, Report, run_self_tests
from hpcutils.image.trust import identity, remember
from hpcutils.image.workspace import ending_on_signals, one_at_a_time, sweep, workspace
from hpcutils.log import LOGGER
from hpcutils.specs.recipe import DebianBase

__all__ = ["Built", "check_builder_rights", "run_build"]


@dataclass(frozen=True)
class Place:
    """Where a build takes place.

    Args:
        bench: Folder, builder and settings.
        builder: What builds, and why.
        why: The same, in words.
    """

    bench: Workbench
    builder: Finding
    why: str


def run_build(plan: BuildPlan, wanted: str | None = None, *, relock: bool = False) -> tuple[Built, BuildPlan]:
    """Make the layers that are missing, test the image, and publish it under its name.

    Until the last moment the old image keeps the name; a build that fails, or is ended, leaves nothing but finished layers.

    Args:
        plan: What to make.
        wanted: The builder to use; the first that works when left out.
        relock: Where locked Debian packages are gone, take what there is, and say so.

    Returns:
        What was built, and the plan that was carried out: `relock` may change it.

    Raises:
        ImageError: Locked Debian packages are gone, a layer could not be made, the self-test failed, or this user cannot build.
        MissingPartError: A tool is not installed.
    """
    name = plan.files.recipe.name
    machine = this_machine()
    temporary = machine.temporary()
    findings = look_for_builders(plan.format, gather_facts(temporary), on_archive=plan.files.archive is not None)
    builder = choose(findings, wanted)
    why = explain(builder, findings)
    with ending_on_signals(), one_at_a_time(plan.environment.parent / f".{name}.lock", f"waiting for another build of {name}"):
        sweep(plan)
        if plan.to_make():
            plan = with_usable_lock(plan, machine, relock=relock)
        # The one that was waited for may have made it.
        to_make = plan.to_make()
        if not to_make:
            return up_to_date(plan), plan
        LOGGER.info(f"{name}: {why}")
        started = time.monotonic()
        with workspace(temporary) as folder:
            place = Place(Workbench(builder.program, folder, machine), builder, why)
            seconds = _make(plan, to_make, place)
        took = round(time.monotonic() - started, 1)
        sidecar = read_sidecar(plan.image)
        LOGGER.info(f"{name}: built in {took:g} s ({', '.join(f'{layer} {s:g} s' for layer, s in seconds.items())})")
        tidy(plan)
        return Built(plan.image, plan.digest, sidecar["sha256"], sidecar["size_bytes"], to_make, took), plan


def _make(plan: BuildPlan, to_make: tuple[str, ...], place: Place) -> dict[str, float]:
    """Make and publish each layer in `to_make`; return how many seconds each took."""
    seconds: dict[str, float] = {}
    for layer in to_make:
        started = time.monotonic()
        LOGGER.info(f"{plan.files.recipe.name}: {layer}")
        if layer == "base":
            assert isinstance(plan.files.recipe.base, DebianBase)
            make_base(plan.files.recipe.base, debian_lock(plan.files), plan.base, place.bench)
        elif layer == "environment":
            make_environment(plan.files, plan.base, plan.wheels, plan.environment, place.bench)
        else:
            _publish_image(plan, layer, place, seconds, started)
        seconds[layer] = round(time.monotonic() - started, 1)
    return seconds


def _publish_image(plan: BuildPlan, layer: str, place: Place, seconds: dict[str, float], started: float) -> None:
    """Put the image together, test it, and only then let it be seen: its file, what is known of it, its name."""
    with _taking_back(plan), publishing(plan.image, suffix=SUFFIXES[plan.format]) as target:
        report = _make_sif(plan, target, place) if plan.format == "apptainer" else _make_archive(plan, target, place)
        if report.failed():
            raise ImageError("\n".join(["the image was built, but its self-test failed:", *report.failed()]))
        check_versions("the image", report.packages.get("debian", {}), debian_lock(plan.files).versions())
        spent = {**seconds, layer: round(time.monotonic() - started, 1)}
        sidecar = _sidecar(plan, target, place, report, spent)
        bill = cyclonedx(plan.files.recipe.name, plan.digest, sidecar["sha256"], report.packages)
        # Flushed now, so that no time passes between the names of the sidecar and of the image.
        fsync_path(target)
        # Before the image: one without a sidecar would count as unfinished, one with the old sidecar must not be seen.
        write_text(sbom_of(plan.image), json.dumps(bill, indent=1) + "\n")
        write_text(sidecar_of(plan.image), json.dumps(sidecar, indent=1) + "\n")
    # Known from the start, so that no job has to read it first.
    remember(plan.image, "", sidecar["sha256"], identity(plan.image))
    link(plan)


@contextlib.contextmanager
def _taking_back(plan: BuildPlan) -> Iterator[None]:
    """Give an image that is there already its own sidecar back when the new image did not come."""
    known = {path: _content(path) for path in (sbom_of(plan.image), sidecar_of(plan.image))}
    before = _number(plan.image)
    try:
        yield
    except BaseException:
        if _number(plan.image) == before:
            for path, content in known.items():
                if content is None:
                    remove(path)
                else:
                    write_text(path, content)
        raise


def _content(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _number(path: Path) -> int | None:
    """Return what tells a file from the one that takes its name."""
    return path.stat().st_ino if path.exists() else None


def _make_sif(plan: BuildPlan, target: Path, place: Place) -> Report:
    """Append the code to the environment, and test the result."""
    make_image(plan.code, plan.environment, target, place.bench)
    LOGGER.info("  self-test")
    return run_self_tests(exec_argv(target, env=TEST_ENVIRONMENT, program=place.builder.program), plain_environment())


def _make_archive(plan: BuildPlan, target: Path, place: Place) -> Report:
    """Build the Dockerfile, and test the archive as whoever gets it will see it."""
    bench = place.bench
    engine = Engine(place.builder.name, place.builder.program, bench.folder, network(bench.machine))
    make_oci(plan.files, plan.code, plan.base, plan.wheels, target, engine, bench)
    LOGGER.info("  self-test")
    with entering(engine, target) as enter:
        return run_self_tests(enter, engine.environment())


def _sidecar(plan: BuildPlan, target: Path, place: Place, report: Report, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return all that is known of a finished image."""
    recipe = plan.files.recipe
    return {
        "schema": 2,
        "name": recipe.name,
        "summary": recipe.summary,
        "variant": recipe.variant,
        "format": plan.format,
        "digest": plan.digest,
        "sha256": digest_file(target),
        "size_bytes": target.stat().st_size,
        "hpcutils": hpcutils.__version__,
        "layers": {
            "base": {"digest": base_digest(plan.files), **read_sidecar(plan.base)},
            "environment": {"digest": environment_digest(plan.files)},
            "wheels": {"digest": wheels_digest(plan.files)},
        },
        # Empty where the recipe's own Debian lock was used.
        "relocked": list(plan.relocked),
        "builder": {"name": place.builder.name, "version": place.builder.version, "why": place.why},
        "tools": versions(place.builder.name, place.builder.version, _tools(plan)),
        "seconds": dict(seconds),
        "python": report.python,
        "packages": {kind: dict(found) for kind, found in report.packages.items()},
        "self_test": [dict(check) for check in report.checks],
    }


def _tools(plan: BuildPlan) -> tuple[str, ...]:
    """Return the programs that a build needs beside its builder."""
    bootstrap = ("mmdebstrap",) if isinstance(plan.files.recipe.base, DebianBase) else ()
    return (*bootstrap, *(("mksquashfs",) if plan.format == "apptainer" else ()))
