"""`hpcutils stage`: what datasets are made of, and what a job would do to have them on a node."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpcutils.cli.options import JSON, emit

if TYPE_CHECKING:
    from hpcutils.staging.dataset import Dataset
    from hpcutils.staging.items import Settings
    from hpcutils.staging.plan import StagePlan

CACHE = click.option("--cache", "root", metavar="DIR", help="The cache [$HPCUTILS_NODE_CACHE, or in $SLURM_TMPDIR, $TMPDIR, /tmp].")
PATH = click.Path(path_type=Path)


@click.group()
def stage() -> None:
    """List a dataset's files; say what staging it would do."""


@stage.command()
@click.argument("places", metavar="DIR|FILE...", nargs=-1, required=True, type=PATH)
@click.option("--output", "-o", metavar="FILE", type=PATH, help="The manifest to write [NAME.manifest.jsonl].")
@click.option("--segment-mib", type=click.IntRange(1, 1024), default=64, show_default=True, help="Size of a segment.")
@JSON
def manifest(places: tuple[Path, ...], output: Path | None, segment_mib: int, as_json: bool) -> None:
    """Read every file of a DIR, or of several FILEs, once, and write its size and digests; print the manifest's path.

    Only the names of one folder at a time are held in memory (150 bytes a file). Paths start from the DIR, or from the folder
    that all FILEs are in.
    The manifest itself, and the older one that it replaces, are left out where they lie in the DIR.
    """
    from hpcutils.staging.find import common_folder, find_files
    from hpcutils.staging.manifest import write_manifest

    source = common_folder(places)
    target = output or Path(f"{source.name if len(places) > 1 or places[0].is_dir() else places[0].name}.manifest.jsonl")
    made = write_manifest(find_files(places), target, segment_mib << 20)
    facts = {"path": str(target), "source": str(source), "files": made.total.files, "size_bytes": made.total.size_bytes}
    emit({**facts, "segments": made.segments, "sha256": made.digest()}, as_json, str(target))


@stage.command()
@click.argument("what", metavar="MANIFEST|TRAIN.YAML", type=PATH)
@CACHE
@click.option("--quota-gb", type=click.FloatRange(min=0, min_open=True), help="What the cache may hold, in GB.")
@click.option("--verify", is_flag=True, help="Hash again what is there.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=None, help="MiB a second to reckon with.")
@JSON
def plan(what: Path, root: str | None, quota_gb: float | None, verify: bool, rate: float | None, as_json: bool) -> None:
    """Say what a job on this node would move, what it would evict, and how long that takes; nothing is touched."""
    from hpcutils.staging.plan import describe

    settings, datasets = _wanted(what, root, quota_gb, verify)
    plans = [_plan(dataset, settings, (rate or 0.0) * (1 << 20)) for dataset in datasets]
    text = "\n\n".join(describe(each, settings.quota_bytes) for each in plans)
    emit({"plans": [_as_dict(each) for each in plans]}, as_json, text)


def _wanted(what: Path, root: str | None, quota_gb: float | None, verify: bool) -> tuple[Settings, list[Dataset]]:
    """Return what is to be staged, and how: options win over what a job says."""
    from hpcutils.specs.job import Staging, load_job
    from hpcutils.staging.want import datasets_of, settings_from

    job = load_job(what) if what.suffix in (".yaml", ".yml") else None
    own = job.staging if job is not None else Staging()
    given = {"cache": root or own.cache, "quota_gb": quota_gb or own.quota_gb, "verify": verify or own.verify}
    settings = settings_from(own.model_copy(update=given))
    return settings, datasets_of(job, what.resolve().parent) if job is not None else _listed(what)


def _listed(manifest: Path) -> list[Dataset]:
    from hpcutils.staging.dataset import dataset_of_manifest
    from hpcutils.staging.manifest import read_manifest

    dataset = dataset_of_manifest(read_manifest(manifest))
    for _ in dataset.entries():
        pass  # every line is checked when its turn comes
    return [dataset]


def _plan(dataset: Dataset, settings: Settings, rate: float) -> StagePlan:
    from hpcutils.staging.look import look, place_of, plan_dataset

    place = place_of(dataset, settings.root)
    return plan_dataset(dataset, place, look(dataset, place, verify=settings.verify), settings.quota_bytes, rate)


def _as_dict(plan: StagePlan) -> dict[str, Any]:
    evict = [kept.name for kept in plan.evict]
    return {**asdict(plan), "target": str(plan.target), "have": len(plan.have), "evict": evict, "seconds": plan.seconds}
