"""The data files of a job, and which of their samples train."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationInfo, field_validator

from hpcutils.hashing import DIGEST_LENGTHS
from hpcutils.specs.fields import Contradiction, Model, check_file

# What fsspec knows and stages read-only; each but ftp and memory needs a package of its own in the image (s3fs, gcsfs, …).
FSSPEC_SCHEMES = {"abfs", "az", "ftp", "gcs", "gs", "hdfs", "memory", "oci", "oss", "s3", "sftp", "smb", "ssh", "webhdfs"}
URL_SCHEMES = {"http", "https", "file"} | FSSPEC_SCHEMES


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
        if value is not None and urlsplit(value).scheme not in URL_SCHEMES:
            raise ValueError(f"an http, https or file URL was expected, or one of fsspec's (s3, gs, sftp, …), got {value!r}")
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


def check_overlap(data: Mapping[str, Any], has_manifest: bool) -> None:
    """Raise `ValueError` where training cannot start before the data is there; `data` is what is checked of its section."""
    if data.get("read") == "mpio":
        raise ValueError("'overlap' does not go with 'read: mpio': MPI-IO reads files that are there")
    if data.get("trust_files"):
        raise ValueError("'overlap' does not go with 'trust_files': the files that a file reads may not be there before it is")
    for file in data.get("files", ()):
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
