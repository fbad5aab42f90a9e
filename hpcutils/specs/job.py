"""`train.yaml`: the typed schema of a training job.

Every model is frozen and refuses unknown keys. `load_job` reads a file, lets command-line values win over it, and reports all
that is wrong at once, each with its line and column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError, ValidationInfo, field_validator

from hpcutils.specs.fields import Contradiction, Model, check_file, check_function
from hpcutils.specs.files import DataFile, Split, check_overlap, has_manifest, written_names
from hpcutils.specs.findings import problems_of
from hpcutils.specs.references import listed, reference_problems
from hpcutils.specs.resources import Resources, layout_problem
from hpcutils.specs.source import Location, Problem, Source
from hpcutils.specs.yaml_file import read_yaml

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Function = Annotated[str, AfterValidator(check_function)]


class Data(Model):
    """Where the samples are and which of them train: datasets of HDF5 files, or batches that the user's own code makes."""

    sequence: Function | None = None
    files: Annotated[tuple[DataFile, ...], Field(validate_default=True)] = ()
    # References `file:dataset`; the rows of several follow each other.
    x: Annotated[tuple[str, ...] | None, Field(validate_default=True)] = None
    y: Annotated[tuple[str, ...] | None, Field(validate_default=True)] = None
    split: Split = Split()
    normalizer: Function | None = None
    classes: Annotated[int, Field(ge=2)] | None = None
    read: Literal["window", "mpio", "independent"] = "window"
    trust_files: bool = False
    stage: Literal["before", "overlap"] = "before"
    make: str | None = None
    args: dict[str, Any] = Field(default={})
    validation_sequence: Function | None = None
    workers: Annotated[int, Field(ge=1)] = 1
    use_processes: bool = False

    @field_validator("files", mode="before")
    @classmethod
    def _listed(cls, value: Any, info: ValidationInfo) -> Any:
        optional = info.data.get("sequence", "wrong") is not None
        if not isinstance(value, list | tuple) or not (value or optional):
            raise ValueError("a list of files was expected, each with a 'path' or a 'url'")
        return tuple(value)

    @field_validator("x", "y", mode="before")
    @classmethod
    def _references(cls, value: Any) -> Any:
        return None if value is None else listed(value)

    @field_validator("stage")
    @classmethod
    def _may_overlap(cls, value: str, info: ValidationInfo) -> str:
        if value == "overlap":
            check_overlap(info.data, has_manifest(info))
        return value

    @field_validator("x", "y")
    @classmethod
    def _dataset(cls, value: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        # One complaint is enough where both are missing: 'x' is not among the checked values then.
        needed = info.data.get("sequence", "wrong") is None and (info.field_name == "x" or "x" in info.data)
        if value is None and needed:
            raise ValueError("is missing: a dataset of 'files', or else 'sequence' in place of x, y and split")
        return value

    @field_validator("x", "y", "split", "normalizer", "classes", "read", "trust_files", "stage")
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
        if value is not None and info.data.get("files") == ():
            raise ValueError("it makes the 'files' that are missing, and there are none")
        return None if value is None else check_file(value, info, "the script that makes the data")

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[Contradiction]:
        """Files differ in name, and what `x` and `y` name is in them."""
        names = written_names(given.get("files"))
        if len(set(names)) != len(names):
            yield (), f"two files have the same name: {', '.join(names)}"
        for key in ("x", "y"):
            for said in reference_problems(given.get(key), names):
                yield (key,), said

    @property
    def datasets(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
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
