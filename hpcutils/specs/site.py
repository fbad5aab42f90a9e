"""The site's profile: what an administrator says once about a cluster, in `site.toml`.

The first of these is read, and nothing else: `$HPCUTILS_SITE_CONFIG` (empty: no profile), `~/.config/hpcutils/site.toml`,
`/etc/hpcutils/site.toml`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from hpcutils.errors import SpecError
from hpcutils.specs.resources import parse_time_s
from hpcutils.specs.toml_findings import location_of, problem
from hpcutils.specs.toml_places import not_toml, places

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
OneLine = Annotated[str, StringConstraints(pattern=r"^[^\n\r]*$")]
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/[^\n\r]*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Status = Literal["current", "deprecated", "withdrawn"]
# How the cluster is asked for GPUs; `none` where a partition gives whole nodes.
GpuDialect = Literal["gpus-per-node", "gres", "gpus", "gpus-per-task", "none"]


class Closed(BaseModel):
    """Frozen; a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PublishedImage(Closed):
    """An image that the site vouches for.

    Args:
        path: The file, as every node sees it.
        sha256: Its digest.
        key: File with the public key of its signature; `None` for an image that is not signed.
        status: A deprecated image is warned of, a withdrawn one is refused.
        note: What users are told: the reason, or what to take instead.
    """

    path: AbsolutePath
    sha256: Sha256
    key: AbsolutePath | None = None
    status: Status = "current"
    note: OneLine = ""


class Launch(Closed):
    """How jobs are started.

    Args:
        mpi: srun's `--mpi`.
        gpus: How Slurm is asked for GPUs.
        gpu_type: Type of GPU in `--gres=gpu:TYPE:N` and its kin.
        partition: Partition of jobs that name none.
    """

    mpi: Name = "pmix"
    gpus: GpuDialect = "gpus-per-node"
    gpu_type: Name | None = None
    partition: Name | None = None


class Container(Closed):
    """How images are run.

    Args:
        program: Apptainer's name, or its path on the nodes.
        binds: Folders of the nodes that every job sees, `/source` or `/source:/target[:ro]`.
        environment: Variables of every job.
    """

    program: OneLine = "apptainer"
    binds: tuple[AbsolutePath, ...] = ()
    environment: dict[VariableName, OneLine] = Field(default_factory=dict)


class Folders(Closed):
    """Where things are. `$USER` and other variables of the submitting user are filled in.

    Args:
        scratch: Folder of the shared file system that every job sees, also as `$HPCUTILS_SCRATCH`.
        node_local: The nodes' own disk: data are staged there.
    """

    scratch: OneLine | None = None
    node_local: OneLine | None = None


class Limits(Closed):
    """What a partition gives at most: asking for more is told at once, not after an hour in the queue."""

    nodes: int | None = Field(default=None, ge=1, strict=True)
    gpus_per_node: int | None = Field(default=None, ge=0, strict=True)
    time: OneLine | None = None

    @field_validator("time")
    @classmethod
    def _time(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                parse_time_s(value)
            return value
        except ValueError as exc:
            raise ValueError(f"a time as HH:MM:SS or D-HH:MM:SS was expected, got {value!r}") from exc


class Build(Closed):
    """How builds reach package servers. Nothing of this enters an image; what a user's own settings say wins.

    Args:
        proxy: For http and https.
        no_proxy: Hosts that are reached without it.
        ca_bundle: File of certificates.
        pip_index: Index of Python packages.
        temporary: Folder for builds: roomy, local, and no network file system.
        apt_sources: Lines of a sources.list that stand for those of the machine: a mirror of the site's, or a snapshot that keeps
            the versions of a lock; lists of any age are taken from it.
    """

    proxy: OneLine | None = None
    no_proxy: OneLine | None = None
    ca_bundle: AbsolutePath | None = None
    pip_index: OneLine | None = None
    temporary: AbsolutePath | None = None
    apt_sources: tuple[OneLine, ...] = ()


class Site(Closed):
    """A whole profile. Without one, every default holds."""

    name: Name = "this-machine"
    launch: Launch = Launch()
    container: Container = Container()
    folders: Folders = Folders()
    limits: dict[Name, Limits] = Field(default_factory=dict)
    build: Build = Build()
    images: dict[Name, PublishedImage] = Field(default_factory=dict)

    @field_validator("images")
    @classmethod
    def _aliases_are_no_paths(cls, value: dict[str, PublishedImage]) -> dict[str, PublishedImage]:
        wrong = [alias for alias in value if alias.endswith((".sif", ".oci.tar"))]
        if wrong:
            raise ValueError(f"{wrong[0]!r}: an alias that ends like a file's name would be taken for one")
        return value


def site_file(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return the file of the site's profile, or `None` where there is none.

    Raises:
        SpecError: `$HPCUTILS_SITE_CONFIG` names a file that is not there.
    """
    variables = os.environ if environ is None else environ
    named = variables.get("HPCUTILS_SITE_CONFIG")
    if named is not None:
        if named and not Path(named).is_file():
            raise SpecError(f"HPCUTILS_SITE_CONFIG: no such file: {named}", "name a site.toml, or leave it empty for no profile")
        return Path(named) if named else None
    configuration = variables.get("XDG_CONFIG_HOME") or Path(variables.get("HOME") or Path.home()) / ".config"
    places = (Path(configuration) / "hpcutils/site.toml", Path("/etc/hpcutils/site.toml"))
    return next((path for path in places if path.is_file()), None)


def load_site(environ: Mapping[str, str] | None = None) -> Site:
    """Return the site's profile; all defaults where there is no file.

    Raises:
        SpecError: The file cannot be read as meant; a line `file:line:column: key: what is wrong` for each problem.
    """
    path = site_file(environ)
    return Site() if path is None else parse_site(_read(path), path.name)


def parse_site(text: str, name: str) -> Site:
    """Return the profile in a TOML `text`; `name` is how messages call it."""
    try:
        return Site.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as exc:
        raise not_toml(exc, name) from exc
    except ValidationError as exc:
        known = places(text, name)
        lines = [f"{known.find(location_of(row))[1]}: {problem(row, Site)}" for row in exc.errors()]
        raise SpecError("\n".join(lines)) from exc


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SpecError(f"{path}: cannot be read: {exc}", "ask whoever keeps it") from exc
