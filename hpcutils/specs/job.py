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
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from hpcutils.errors import RequestError
from hpcutils.hashing import DIGEST_LENGTHS
from hpcutils.specs.references import check_references, listed
from hpcutils.specs.source import Location, Problem, read_yaml

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
FUNCTION_PATTERN = r"^(?P<file>[^:]+\.py):(?P<function>[A-Za-z_]\w*)$"
TIME_PATTERN = re.compile(r"^(?:(?P<days>\d+)-)?(?:(?P<a>\d+):)?(?P<b>\d{1,2}):(?P<c>\d{2})$")


class Model(BaseModel):
    """Common settings: frozen, closed, strict enough that `"3"` is not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def base_folder(info: ValidationInfo) -> Path | None:
    """Return the folder that relative paths start from; `None` when a resolved job is read back."""
    return (info.context or {}).get("base")


def check_function(value: str, info: ValidationInfo) -> str:
    """Check `file.py:function`: its form, and that the file is there."""
    match = re.match(FUNCTION_PATTERN, value)
    if match is None:
        raise ValueError(f"'file.py:function' was expected, got {value!r}")
    base = base_folder(info)
    if base is not None and not (base / match["file"]).is_file():
        raise ValueError(f"no such file: {match['file']} (looked in the folder of the job file)")
    return value


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
        base = base_folder(info)
        made = (info.context or {}).get("data_is_made", False)
        if value is not None and base is not None and not made and not (base / value).is_file():
            raise ValueError(f"no such file: {value} (looked in the folder of the job file)")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> DataFile:
        if (self.path is None) == (self.url is None):
            raise ValueError("give either 'path' or 'url'")
        if self.url is not None and self.sha256 is None:
            raise ValueError("a file by URL needs its 'sha256'")
        return self

    @property
    def stored_name(self) -> str:
        """The name of what is staged, without its folders: an archive's where a member of one is used."""
        return Path(self.path if self.path is not None else urlsplit(self.url or "").path).name

    @property
    def name(self) -> str:
        """The data file's own name, without its folders."""
        return Path(self.extract).name if self.extract is not None else self.stored_name


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
    # References `file:dataset`; the rows of several follow each other.
    x: tuple[str, ...]
    y: tuple[str, ...]
    split: Split = Split()
    normalizer: str | None = None
    classes: Annotated[int, Field(ge=2)] | None = None
    read: Literal["window", "mpio", "independent"] = "window"
    trust_files: bool = False
    make: str | None = None

    @field_validator("files", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if not value or not isinstance(value, list | tuple):
            raise ValueError("a list of files was expected, each with a 'path' or a 'url'")
        return tuple(value)

    @field_validator("x", "y", mode="before")
    @classmethod
    def _references(cls, value: Any) -> Any:
        return listed(value)

    @field_validator("x", "y")
    @classmethod
    def _of_files(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if "files" in info.data:
            check_references(value, [file.name for file in info.data["files"]])
        return value

    @field_validator("normalizer")
    @classmethod
    def _normalizer(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else check_function(value, info)

    @field_validator("make")
    @classmethod
    def _make(cls, value: str | None, info: ValidationInfo) -> str | None:
        base = base_folder(info)
        if value is not None and base is not None and not (base / value).is_file():
            raise ValueError(f"no such file: {value} (the script that makes the data)")
        return value

    @model_validator(mode="after")
    def _known_files(self) -> Data:
        names = [file.name for file in self.files]
        if len(set(names)) != len(names):
            raise ValueError(f"two files have the same name: {', '.join(names)}")
        return self

    def locate(self, reference: str) -> tuple[str, str]:
        """Split `digits.h5:images` into file name and dataset; without a file the first one is meant."""
        file, _, dataset = reference.rpartition(":")
        return (file or self.files[0].name), dataset


class ModelSpec(Model):
    """The function that returns a Keras model."""

    function: str
    args: dict[str, Any] = {}
    custom_objects: dict[str, str] = {}

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
    data = source.data.get("data")
    context = {"base": path.resolve().parent, "data_is_made": isinstance(data, dict) and bool(data.get("make"))}
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
