"""From a job to the datasets that its nodes want."""

from __future__ import annotations

import contextlib
from pathlib import Path

from hpcutils.specs.files import DataFile
from hpcutils.specs.job import Job
from hpcutils.staging.cache import cache_root
from hpcutils.staging.dataset import Dataset, dataset_of_file, dataset_of_manifest
from hpcutils.staging.manifest import read_manifest
from hpcutils.staging.origins import origin_of
from hpcutils.staging.stage import Item, Settings, facts_of


def settings_of(job: Job) -> Settings:
    """Return how the job wants its data staged, on the node that asks."""
    quota = job.staging.quota_gb
    return Settings(cache_root(job.staging.cache), None if quota is None else int(quota * 1e9), job.staging.verify)


def item_of(file: DataFile, job_folder: Path) -> Item:
    """Return a file of `data.files` with its absolute origin."""
    return Item(file.stored_name, file.url or str((job_folder / (file.path or "")).resolve()), file.sha256)


def manifest_of(job: Job, job_folder: Path) -> Path | None:
    """Return the job's manifest, if it has one."""
    return None if job.staging.manifest is None else (job_folder / job.staging.manifest).resolve()


def source_of(job: Job, job_folder: Path) -> str | None:
    """Return the folder or URL that the manifest's paths start from; `None` is the manifest's own folder."""
    source = job.staging.source
    return source if source is None or "://" in source else str((job_folder / source).resolve())


def listed_in(manifest: Path, files: tuple[DataFile, ...]) -> dict[str, tuple[str, str | None]]:
    """Return, for the files that a manifest lists, their path in it and their digest, by the file's name.

    A file of `data.files` is the one of the same path in the manifest, or else the one of the same name.
    """
    wanted = {file.path or file.stored_name: file.name for file in files}
    by_name = {file.stored_name: file.name for file in files}
    found: dict[str, tuple[str, str | None]] = {}
    for entry in read_manifest(manifest).entries():
        name = wanted.get(entry.path)
        if name is not None:
            found[name] = (entry.path, entry.sha256)
        elif (last := entry.path.rpartition("/")[2]) in by_name:
            found.setdefault(by_name[last], (entry.path, entry.sha256))
    return found


def datasets_of(job: Job, job_folder: Path) -> list[Dataset]:
    """Return what a job on one node stages."""
    manifest = manifest_of(job, job_folder)
    listed = {} if manifest is None else listed_in(manifest, job.data.files)
    datasets = [] if manifest is None else [dataset_of_manifest(read_manifest(manifest))]
    for item in (item_of(file, job_folder) for file in job.data.files if file.name not in listed):
        with contextlib.closing(origin_of(item.origin, single=True)) as origin:
            size_bytes, identity = facts_of(item, origin)
        datasets.append(dataset_of_file(item.name, size_bytes or 0, item.sha256, identity))
    return datasets
