"""The data files of a job, and what all models of `train.yaml` share: frozen, closed, functions by `file.py:function`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from hpcutils.hashing import DIGEST_LENGTHS

FUNCTION_PATTERN = r"^(?P<file>[^:]+\.py):(?P<function>[A-Za-z_]\w*)$"


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
