"""From a job to the datasets that its nodes want."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from urllib.parse import urlsplit

from hpcutils.errors import SpecError
from hpcutils.specs.files import DataFile
from hpcutils.specs.job import Job, Staging
from hpcutils.staging.cache import cache_root
from hpcutils.staging.dataset import Dataset, dataset_of_file, dataset_of_manifest
from hpcutils.staging.items import Item, Settings
from hpcutils.staging.manifest import Entry, read_entry, read_lines, read_manifest
from hpcutils.staging.origins import origin_of
from hpcutils.staging.stage import facts_of

# More than any path has in common with another.
EXACT = 1 << 20


def settings_of(job: Job) -> Settings:
    """Return how the job wants its data staged, on the node that asks."""
    return settings_from(job.staging)


def settings_from(staging: Staging) -> Settings:
    """Return what `staging` in a train.yaml says, on the node that asks."""
    quota = staging.quota_gb
    return Settings(cache_root(staging.cache), None if quota is None else int(quota * 1e9), staging.verify)


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


def listed_in(manifest: Path, files: tuple[DataFile, ...], job_folder: Path = Path()) -> dict[str, tuple[str, str | None]]:
    """Return, for the files that a manifest lists, their path in it and their digest, by the file's name.

    A file of `data.files` is the one of the same path, or else the one whose path ends as the file's own does: all of the shorter
    of the two paths must agree, or the digests must. A file of the same name in another folder is another file.

    Raises:
        SpecError: Two listed files could be meant.
    """
    alike: dict[str, list[tuple[int, Entry]]] = {file.name: [] for file in files}
    for entry in _called(manifest, {file.stored_name for file in files}):
        for file in files:
            likeness = _likeness(file, entry, job_folder)
            if likeness:
                alike[file.name].append((likeness, entry))
    found = {file.name: _likest(manifest, file, alike[file.name]) for file in files if alike[file.name]}
    return {name: (entry.path, entry.sha256) for name, entry in found.items()}


def _called(manifest: Path, names: set[str]) -> Iterator[Entry]:
    """Yield a manifest's files of these names. Of a hundred thousand lines only those are parsed that may hold one."""
    ends = [json.dumps(name)[1:] for name in names]
    with read_lines(manifest) as lines:
        for number, line in enumerate(lines, start=1):
            # A name may be written in another way than ours where it has a backslash, or letters outside ASCII.
            if number > 1 and (any(end in line for end in ends) or "\\" in line or not line.isascii()):
                entry = read_entry(manifest, number, line)
                if entry is not None and entry.path.rpartition("/")[2] in names:
                    yield entry


def _likeness(file: DataFile, entry: Entry, job_folder: Path) -> int:
    """Return how many parts the two paths have in common at their ends; 0 when they are those of different files."""
    theirs = entry.path.split("/")
    if theirs[-1] != file.stored_name:
        return 0
    written = urlsplit(file.url).path if file.url else os.path.normpath(file.path or "")
    if entry.path == written:
        return EXACT
    ours = (written if file.url else os.path.normpath(job_folder / written)).split("/")
    pairs = zip(reversed(ours), reversed(theirs), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    same_bytes = None is not file.sha256 == entry.sha256
    return common if same_bytes or common >= min(len(theirs), len(written.split("/"))) else 0


def _likest(manifest: Path, file: DataFile, alike: list[tuple[int, Entry]]) -> Entry:
    alike = [each for each in alike if None is not file.sha256 == each[1].sha256] or alike
    most = max(likeness for likeness, _ in alike)
    best = [entry for likeness, entry in alike if likeness == most]
    if len({entry.sha256 or entry.path for entry in best}) > 1:
        raise SpecError(
            f"{file.name}: {manifest.name} lists {best[0].path!r} and {best[1].path!r}, and either may be meant",
            "write its path in data.files as it stands in the manifest, or give its sha256",
        )
    return best[0]


def datasets_of(job: Job, job_folder: Path) -> list[Dataset]:
    """Return what a job on one node stages."""
    manifest = manifest_of(job, job_folder)
    listed = {} if manifest is None else listed_in(manifest, job.data.files, job_folder)
    datasets = [] if manifest is None else [dataset_of_manifest(read_manifest(manifest))]
    for item in (item_of(file, job_folder) for file in job.data.files if file.name not in listed):
        with contextlib.closing(origin_of(item.origin, single=True)) as origin:
            size_bytes, identity = facts_of(item, origin)
        datasets.append(dataset_of_file(item.name, size_bytes or 0, item.sha256, identity))
    return datasets
