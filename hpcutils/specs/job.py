"""`train.yaml`: the typed schema of a training job.

Every model is frozen and refuses unknown keys. `load_job` reads a file, lets command-line values win over it, and reports all
that is wrong at once, each with its line and column.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from hpcutils.errors import RequestError
from hpcutils.specs.files import DataFile, Model, Split, base_folder, check_function, check_overlap, has_manifest
from hpcutils.specs.source import Location, Problem, read_yaml

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
TIME_PATTERN = re.compile(r"^(?:(?P<days>\d+)-)?(?:(?P<a>\d+):)?(?P<b>\d{1,2}):(?P<c>\d{2})$")


class Data(Model):
    """Where the samples are and which of them train: datasets of HDF5 files, or batches that the user's own code makes."""

    sequence: str | None = None
    files: Annotated[tuple[DataFile, ...], Field(validate_default=True)] = ()
    x: Annotated[str | None, Field(validate_default=True)] = None
    y: Annotated[str | None, Field(validate_default=True)] = None
    split: Split = Split()
    normalizer: str | None = None
    classes: Annotated[int, Field(ge=2)] | None = None
    read: Literal["window", "mpio", "independent"] = "window"
    stage: Literal["before", "overlap"] = "before"
    make: str | None = None
    args: dict[str, Any] = Field(default={})
    validation_sequence: str | None = None
    workers: Annotated[int, Field(ge=1)] = 1
    use_processes: bool = False

    @field_validator("files", mode="before")
    @classmethod
    def _listed(cls, value: Any, info: ValidationInfo) -> Any:
        optional = info.data.get("sequence", "wrong") is not None
        if not isinstance(value, list | tuple) or not (value or optional):
            raise ValueError("a list of files was expected, each with a 'path' or a 'url'")
        return tuple(value)

    @field_validator("sequence", "normalizer", "validation_sequence")
    @classmethod
    def _function(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else check_function(value, info)

    @field_validator("stage")
    @classmethod
    def _may_overlap(cls, value: str, info: ValidationInfo) -> str:
        if value == "overlap":
            check_overlap(info.data.get("files", ()), info.data.get("read", ""), has_manifest(info))
        return value

    @field_validator("x", "y")
    @classmethod
    def _dataset(cls, value: str | None, info: ValidationInfo) -> str | None:
        # One complaint is enough where both are missing: 'x' is not among the checked values then.
        needed = info.data.get("sequence", "wrong") is None and (info.field_name == "x" or "x" in info.data)
        if value is None and needed:
            raise ValueError("is missing: a dataset of 'files', or else 'sequence' in place of x, y and split")
        return value

    @field_validator("x", "y", "split", "normalizer", "classes", "read", "stage")
    @classmethod
    def _of_datasets(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("sequence") is not None and _is_given(cls, value, info):
            raise ValueError("belongs to datasets (x and y); the batches of a 'sequence' are taken as they are")
        return value

    @field_validator("args", "validation_sequence", "workers", "use_processes")
    @classmethod
    def _of_sequence(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("sequence", "wrong") is None and _is_given(cls, value, info):
            raise ValueError("belongs to a 'sequence', and there is none")
        return value

    @field_validator("args")
    @classmethod
    def _args(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "files" in value:
            raise ValueError("'files' is what the function is given the staged files by; call yours otherwise")
        return value

    @field_validator("make")
    @classmethod
    def _make(cls, value: str | None, info: ValidationInfo) -> str | None:
        base = base_folder(info)
        if value is not None and base is not None and not (base / value).is_file():
            raise ValueError(f"no such file: {value} (the script that makes the data)")
        if value is not None and info.data.get("files") == ():
            raise ValueError("it makes the 'files' that are missing, and there are none")
        return value

    @model_validator(mode="after")
    def _known_files(self) -> Data:
        names = [file.name for file in self.files]
        if len(set(names)) != len(names):
            raise ValueError(f"two files have the same name: {', '.join(names)}")
        for reference in filter(None, (self.x, self.y)):
            file, _, _ = reference.rpartition(":")
            if file and file not in names:
                raise ValueError(f"{reference!r} names no file of 'files' ({', '.join(names)})")
        return self

    @property
    def datasets(self) -> tuple[str, str]:
        """x and y of a job without a `sequence`."""
        assert self.x is not None
        assert self.y is not None
        return self.x, self.y

    def locate(self, reference: str) -> tuple[str, str]:
        """Split `digits.h5:images` into file name and dataset; without a file the first one is meant."""
        file, _, dataset = reference.rpartition(":")
        return (file or self.files[0].name), dataset


def _is_given(cls: type[BaseModel], value: Any, info: ValidationInfo) -> bool:
    """Return whether a value says more than the key's default does: a resolved job spells all of them out."""
    return bool(value != cls.model_fields[info.field_name or ""].default)


class ModelSpec(Model):
    """The function that returns a Keras model."""

    function: str
    args: dict[str, Any] = Field(default={})
    custom_objects: dict[str, str] = Field(default={})

    @field_validator("function")
    @classmethod
    def _function(cls, value: str, info: ValidationInfo) -> str:
        return check_function(value, info)

    @field_validator("custom_objects")
    @classmethod
    def _objects(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        for reference in value.values():
            check_function(reference, info)
        return value


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


class Resources(Model):
    """What the job asks Slurm for."""

    nodes: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[int, Field(ge=1)] | None = None
    gpus_per_node: Annotated[int, Field(ge=1)] | None = None
    cpus_per_task: Annotated[int, Field(ge=1)] = 1
    time: str = "01:00:00"
    partition: str | None = None
    devices: Literal["gpu", "simulated"] = "gpu"
    replication: Literal["per_node", "per_gpu"] = "per_node"

    @field_validator("time")
    @classmethod
    def _time(cls, value: str) -> str:
        if TIME_PATTERN.match(value) is None or parse_time_s(value) < 60:
            raise ValueError(f"a time of at least a minute as HH:MM:SS or D-HH:MM:SS was expected, got {value!r}")
        return value


class Checkpoints(Model):
    """How often rank 0 writes a checkpoint, and how many are kept."""

    every_epochs: Annotated[int, Field(ge=1)] = 1
    every_steps: Annotated[int, Field(ge=1)] | None = None
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
        base = base_folder(info)
        if value is not None and base is not None and not (base / value).is_file():
            raise ValueError(f"no such file: {value} (made by 'hpcutils stage manifest')")
        return value

    @field_validator("cache")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("/"):
            raise ValueError(f"an absolute path was expected, got {value!r}")
        return value

    @model_validator(mode="after")
    def _source_of_what(self) -> Staging:
        if self.source is not None and self.manifest is None:
            raise ValueError("'source' is where the files of a 'manifest' are, and there is none")
        return self


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


def parse_time_s(text: str) -> int:
    """Return the seconds in a Slurm time (`MM:SS`, `HH:MM:SS`, `D-HH:MM:SS`)."""
    match = TIME_PATTERN.match(text)
    if match is None:
        raise ValueError(text)
    days, hours, minutes, seconds = (int(match[group] or 0) for group in ("days", "a", "b", "c"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def gpus_per_node(resources: Resources) -> int:
    """Return the GPUs of each node.

    Raises:
        RequestError: The job's total does not divide by the nodes, or total and per-node number contradict each other.
    """
    total, each, nodes = resources.gpus, resources.gpus_per_node, resources.nodes
    if total is not None and total % nodes:
        lower, upper = total - total % nodes, total + nodes - total % nodes
        near = f"{lower} or {upper}" if lower else str(upper)
        raise RequestError(
            f"--gpus {total} does not divide by --nodes {nodes}: every node gets the same number",
            f"ask for {near} GPUs, or say --gpus-per-node",
        )
    if total is not None and each is not None and total != each * nodes:
        raise RequestError(
            f"--gpus {total} (the job's total) contradicts --gpus-per-node {each} on {nodes} nodes ({each * nodes})",
            "give one of the two",
        )
    if total is not None:
        return total // nodes
    return each if each is not None else 1


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
    try:
        return Job.model_validate(source.data, context=context)
    except ValidationError as exc:
        raise source.error([_problem(error) for error in exc.errors()]) from exc


def read_job(text: str) -> Job:
    """Read a resolved job (JSON) back, on the node: nothing is looked up on disk."""
    return Job.model_validate_json(text)


EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than": "less than {lt}",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "text of the form {pattern}",
}


def _problem(error: Mapping[str, Any]) -> Problem:
    """Translate one of pydantic's findings into a place and a sentence."""
    location = tuple(part for part in error["loc"] if part not in ("str", "dict[str,any]"))
    kind, given = error["type"], error.get("input")
    if kind == "extra_forbidden":
        return Problem(location, _unknown_key(location), at_key=True)
    if kind == "missing":
        return Problem(location[:-1] or location, f"key {location[-1]!r} is missing", at_key=True)
    if kind in EXPECTED:
        expected = EXPECTED[kind].format(**error.get("ctx", {}))
        return Problem(location, f"{_dotted(location)}: {expected} was expected, got {_short(given)}")
    if kind == "value_error":
        return Problem(location, f"{_dotted(location)}: {error['ctx']['error']}")
    return Problem(location, f"{_dotted(location)}: {error['msg']}, got {_short(given)}")


def _unknown_key(location: Location) -> str:
    known = list(_model_at(location[:-1]).model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {location[-1]!r}; {advice}"


def _model_at(location: Location) -> type[BaseModel]:
    """Return the model that a location lies in."""
    children: dict[str, type[BaseModel]] = {"data": Data, "files": DataFile, "split": Split, "model": ModelSpec}
    children |= {"training": Training, "resources": Resources, "checkpoints": Checkpoints, "staging": Staging}
    names = [part for part in location if isinstance(part, str)]
    return children[names[-1]] if names else Job


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location) or "the file"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
