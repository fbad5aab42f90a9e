"""`train.yaml`: the typed schema of a training job.

Every model is frozen and refuses unknown keys. `load_job` reads a file, lets command-line values win over it, and reports all
that is wrong at once, each with its line and column.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator

from hpcutils.hashing import DIGEST_LENGTHS
from hpcutils.specs.fields import Contradiction, Model, check_file, check_function
from hpcutils.specs.findings import problems_of
from hpcutils.specs.resources import Resources, layout_problem
from hpcutils.specs.source import Location, Problem, Source
from hpcutils.specs.yaml_file import read_yaml

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Function = Annotated[str, AfterValidator(check_function)]


class DataFile(Model):
    """One HDF5 file, by path or by URL."""

    path: str | None = None
    url: str | None = None
    sha256: str | None = None
    extract: str | None = None

    @field_validator("extract")
    @classmethod
    def _inside(cls, value: str | None) -> str | None:
        if value is not None and any(part in ("", ".", "..") for part in value.split("/")):
            raise ValueError(f"the path of a member of the archive was expected, got {value!r}")
        return value

    @field_validator("sha256")
    @classmethod
    def _digest(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if len(value) != DIGEST_LENGTHS["sha256"]:
            raise ValueError(f"a sha256 has 64 hexadecimal digits, this has {len(value)}")
        if not re.fullmatch(r"[0-9a-fA-F]+", value):
            raise ValueError("a sha256 has hexadecimal digits only")
        return value.lower()

    @field_validator("url")
    @classmethod
    def _scheme(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).scheme not in ("http", "https", "file"):
            raise ValueError(f"an http, https or file URL was expected, got {value!r}")
        return value

    @field_validator("path")
    @classmethod
    def _exists(cls, value: str | None, info: ValidationInfo) -> str | None:
        made = bool((info.context or {}).get("data_is_made", False))
        return None if value is None else check_file(value, info, may_be_missing=made)

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[Contradiction]:
        """A file has one source, and one by URL its digest."""
        if (given.get("path") is None) == (given.get("url") is None):
            yield (), "give either 'path' or 'url'"
        if given.get("url") is not None and given.get("sha256") is None:
            yield (), "a file by URL needs its 'sha256'"

    @property
    def stored_name(self) -> str:
        """The name of what is staged, without its folders: an archive's where a member of one is used."""
        return stored_name(self.path, self.url)

    @property
    def name(self) -> str:
        """The data file's own name, without its folders."""
        return Path(self.extract).name if self.extract is not None else self.stored_name


def stored_name(path: str | None, url: str | None) -> str:
    """Return the name, without folders, of a file by path or by URL."""
    return Path(path if path is not None else urlsplit(url or "").path).name


def written_names(files: Any) -> list[str]:
    """Return the names of `data.files` as they were written, whatever else is wrong with them."""
    names = []
    for file in files if isinstance(files, list | tuple) else ():
        written = {key: value for key, value in file.items() if isinstance(value, str)} if isinstance(file, Mapping) else {}
        try:
            names.append(Path(written.get("extract") or stored_name(written.get("path"), written.get("url"))).name)
        except ValueError:
            continue  # a URL that is none: reported where it stands
    return [name for name in names if name]


def has_manifest(info: ValidationInfo) -> bool:
    """Return whether a file without a sha256 may be listed in a manifest; when a resolved job is read back, that was checked."""
    return bool((info.context or {}).get("has_manifest", True))


def check_overlap(files: tuple[DataFile, ...], read: str, has_manifest: bool) -> None:
    """Raise `ValueError` where training cannot start before the data is there."""
    if read == "mpio":
        raise ValueError("'overlap' does not go with 'read: mpio': MPI-IO reads files that are there")
    for file in files:
        if file.extract is not None:
            raise ValueError(f"'overlap' does not go with 'extract': {file.name} is there when all of its archive is")
        if file.sha256 is None and not has_manifest:
            raise ValueError(f"'overlap' must know what arrives: {file.name} has no 'sha256', and there is no 'staging.manifest'")


class Split(Model):
    """Half-open ranges of sample numbers; an end of `null` is the end of the data."""

    train: tuple[int, int | None] = (0, None)
    validation: tuple[int, int | None] | None = None

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ValueError(f"[start, end] was expected, got {value!r}")
        start, end = value
        if not isinstance(start, int) or start < 0 or not (end is None or (isinstance(end, int) and end > start)):
            raise ValueError(f"[start, end] with 0 <= start < end was expected, got {value!r}")
        return tuple(value)


class Data(Model):
    """Where the samples are and which of them train."""

    files: tuple[DataFile, ...]
    x: str
    y: str
    split: Split = Split()
    normalizer: Function | None = None
    classes: Annotated[int, Field(ge=2)] | None = None
    read: Literal["window", "mpio", "independent"] = "window"
    stage: Literal["before", "overlap"] = "before"
    make: str | None = None

    @field_validator("files", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if not value or not isinstance(value, list | tuple):
            raise ValueError("a list of files was expected, each with a 'path' or a 'url'")
        return tuple(value)

    @field_validator("stage")
    @classmethod
    def _may_overlap(cls, value: str, info: ValidationInfo) -> str:
        if value == "overlap":
            check_overlap(info.data.get("files", ()), info.data.get("read", ""), has_manifest(info))
        return value

    @field_validator("make")
    @classmethod
    def _make(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else check_file(value, info, "the script that makes the data")

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[Contradiction]:
        """Files differ in name, and `x` and `y` name one of them."""
        names = written_names(given.get("files"))
        if len(set(names)) != len(names):
            yield (), f"two files have the same name: {', '.join(names)}"
        for key in ("x", "y"):
            reference = given.get(key)
            file = reference.rpartition(":")[0] if isinstance(reference, str) else ""
            if file and file not in names:
                yield (key,), f"{reference!r} names no file of 'files' ({', '.join(names)})"

    def locate(self, reference: str) -> tuple[str, str]:
        """Split `digits.h5:images` into file name and dataset; without a file the first one is meant."""
        file, _, dataset = reference.rpartition(":")
        return (file or self.files[0].name), dataset


class ModelSpec(Model):
    """The function that returns a Keras model."""

    function: Function
    args: dict[str, Any] = Field(default_factory=dict)
    custom_objects: dict[str, Function] = Field(default_factory=dict)


class Training(Model):
    """How long, with what, towards what."""

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    optimizer: str | dict[str, Any] = "adam"
    loss: str
    metrics: tuple[str, ...] = ()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @field_validator("metrics", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("optimizer")
    @classmethod
    def _named(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(value, dict) and not isinstance(value.get("name"), str):
            raise ValueError("an optimizer given as a mapping needs its 'name', e.g. {name: adam, learning_rate: 0.001}")
        return value


class Checkpoints(Model):
    """How often rank 0 writes a checkpoint, and how many are kept."""

    every_epochs: Annotated[int, Field(ge=1)] = 1
    keep: Annotated[int, Field(ge=1)] = 2


class Staging(Model):
    """How data gets to the nodes' own disks."""

    manifest: str | None = None
    source: str | None = None
    cache: str | None = None
    quota_gb: Annotated[float, Field(gt=0)] | None = None
    verify: bool = False

    @field_validator("manifest")
    @classmethod
    def _manifest(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else check_file(value, info, "made by 'hpcutils stage manifest'")

    @field_validator("cache")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("/"):
            raise ValueError(f"an absolute path was expected, got {value!r}")
        return value

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[Contradiction]:
        """A source is that of a manifest."""
        if given.get("source") is not None and given.get("manifest") is None:
            yield (), "'source' is where the files of a 'manifest' are, and there is none"


class Job(Model):
    """A whole training job, as written."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    image: str | None = None
    data: Data
    model: ModelSpec
    training: Training
    resources: Resources = Resources()
    checkpoints: Checkpoints = Checkpoints()
    staging: Staging = Staging()


def load_job(path: Path, overrides: Mapping[Location, tuple[str, Any]] | None = None) -> Job:
    """Read and check `train.yaml`.

    Args:
        path: The file; paths in it are relative to its folder.
        overrides: Values of the command line by location, each with the option's name.

    Raises:
        SpecError: Anything in it is not as expected; the message has a line `train.yaml:12:5: …` for each problem.
    """
    source = read_yaml(path)
    for location, (option, value) in (overrides or {}).items():
        source.override(location, value, option)
    data, staging = (section if isinstance(section, dict) else {} for section in map(source.data.get, ("data", "staging")))
    context = {
        "base": path.resolve().parent,
        "data_is_made": bool(data.get("make")),
        "has_manifest": bool(staging.get("manifest")),
    }
    job, problems = None, [*source.problems, *_layout_problems(source)]
    try:
        job = Job.model_validate(source.data, context=context)
    except ValidationError as exc:
        problems += problems_of(exc.errors(), Job)
    if job is None or problems:
        raise source.error(problems)
    return job


def _layout_problems(source: Source) -> list[Problem]:
    """Return what is wrong with the file's own numbers of nodes and GPUs; those of options are an impossible request instead."""
    given = source.data.get("resources")
    section = given if isinstance(given, dict) else {}
    numbers = [section.get("nodes", 1), section.get("gpus"), section.get("gpus_per_node")]
    nodes, total, each = (number if type(number) is int and number > 0 else None for number in numbers)
    if nodes is None or any(("resources", key) in source.overrides for key in ("nodes", "gpus", "gpus_per_node")):
        return []
    found = layout_problem(nodes, total, each)
    return [] if found is None else [Problem(("resources", "gpus"), f"resources.{'; '.join(found).replace(' ', ': ', 1)}")]


def read_job(text: str) -> Job:
    """Read a resolved job (JSON) back, on the node: nothing is looked up on disk."""
    return Job.model_validate_json(text)
