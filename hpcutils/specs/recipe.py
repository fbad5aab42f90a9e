"""A recipe: what goes into a container image. The types, and which of their combinations make sense.

`recipe_file` reads one from `containers/recipes/*.toml`, together with the recipe that it extends and all files that it names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

from hpcutils.specs.combinations import UnfitPartsError, problems_of

FILE_ENDINGS = (".sif", ".tar", ".toml", ".json")


def _one_line(value: str) -> str:
    """Text that both formats take as it is: Apptainer fills in `{{ … }}` wherever it stands in a definition."""
    if any(ord(letter) < 32 or 127 <= ord(letter) < 160 or letter in "\u2028\u2029" for letter in value):
        raise ValueError(f"one line without control characters was expected, got {value!r}")
    if "{{" in value:
        raise ValueError(f"'{{{{' starts a variable of Apptainer's definitions, got {value!r}")
    return value


def _normal_path(value: str) -> str:
    """A path that names one thing in one way."""
    if any(part in ("", ".", "..") for part in value.split("/")[1:]):
        raise ValueError(f"a path without '.', '..', '//' or a '/' at its end was expected, got {value!r}")
    return value


def _no_ending(value: str) -> str:
    if value.endswith(FILE_ENDINGS):
        raise ValueError(f"a name that ends like a file's would be taken for one, got {value!r}")
    return value


# Text that is pasted into a build script: names only, nothing that a shell reads. A '-' at the end would have apt remove it.
PackageName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9+.:_-]*[a-z0-9+])?$")]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Version = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)*$")]
OneLine = Annotated[str, AfterValidator(_one_line)]
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/[A-Za-z0-9._/+-]+$"), AfterValidator(_normal_path)]
# Also the name of an image of Docker's, and of files with an ending of their own.
RecipeName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+([._-][a-z0-9]+)*$", max_length=63), AfterValidator(_no_ending)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# A tag can lead to another image tomorrow: a digest is asked for.
ImageByDigest = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-zA-Z0-9._:/-]*@sha256:[0-9a-f]{64}$")]
Suite = Literal["bookworm"]
VariantName = Literal["cpu", "cuda", "rocm"]


class Closed(BaseModel):
    """Frozen; a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DebianBase(Closed):
    """The distribution that everything stands on, bootstrapped from its packages.

    Args:
        suite: Debian's name of the release.
        packages: Packages beside the smallest set that apt works with.
        epoch: Date, in seconds since 1970, of what has no date of its own.
        sha256: Digest that the bootstrapped archive must have; `None` accepts what the mirror has today.
    """

    suite: Suite
    packages: tuple[PackageName, ...]
    epoch: int = Field(ge=0, strict=True)
    sha256: Sha256 | None = None


class ImageBase(Closed):
    """An image of a registry, by digest; it has to be of the same Debian release.

    Args:
        suite: Debian's name of the release.
        image: `registry/name@sha256:…`.
        packages: Packages that it needs beside its own.
    """

    suite: Suite
    image: ImageByDigest
    packages: tuple[PackageName, ...] = ()


class ArchiveBase(Closed):
    """An OCI archive (`podman save --format oci-archive`, `buildah push … oci-archive:`) of the same Debian release.

    Args:
        suite: Debian's name of the release.
        archive: The file.
        sha256: Its digest.
        packages: Packages that it needs beside its own.
    """

    suite: Suite
    archive: str
    sha256: Sha256
    packages: tuple[PackageName, ...] = ()


def _kind_of_base(data: Any) -> str:
    keys = data if isinstance(data, dict) else getattr(data, "__dict__", {})
    return next((kind for kind in ("image", "archive") if kind in keys), "debian")


Base = Annotated[
    Annotated[DebianBase, Tag("debian")] | Annotated[ImageBase, Tag("image")] | Annotated[ArchiveBase, Tag("archive")],
    Discriminator(_kind_of_base),
]


class System(Closed):
    """Debian packages that stay in the image.

    Args:
        packages: Their names.
        lock: Exact version of every Debian package: of the base, of these, and of those that compiling needs.
        extra_locks: More of them: what a recipe adds to the one that it extends.
    """

    packages: tuple[PackageName, ...] = ()
    lock: str | None = None
    extra_locks: tuple[str, ...] = ()


class Python(Closed):
    """Python packages installed from wheels, every file known by its hash.

    Args:
        version: Of the interpreter, which is Debian's.
        lock: The packages.
        extra_locks: More of them: what a recipe adds to the one that it extends.
        pins: Versions that the locks must have.
    """

    version: Literal["3.11"]
    lock: str
    extra_locks: tuple[str, ...] = ()
    pins: dict[PackageName, Version] = Field(default_factory=dict)


class CompiledPackage(Closed):
    """A package compiled for this image.

    Args:
        name: Its name in the lock.
        version: Its version in the lock.
        built_against: Locked packages whose version the result depends on.
        environment: Variables of its build.
    """

    name: PackageName
    version: Version
    built_against: tuple[PackageName, ...] = ()
    environment: dict[VariableName, OneLine] = Field(default_factory=dict)


class Compile(Closed):
    """The stage that compiles; none of its packages and tools stay in the image.

    Args:
        system_packages: Debian packages: compilers, headers.
        tools_lock: Python packages that compiling needs, in a folder of their own (`/opt/tools`).
        links: Symbolic links made first (path → what it leads to): wheels of libraries lack the names that linkers look for.
        lock: The packages to compile.
        packages: How each is compiled.
    """

    system_packages: tuple[PackageName, ...] = ()
    tools_lock: str
    links: dict[AbsolutePath, Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/+-]+$")]] = Field(default_factory=dict)
    lock: str
    packages: tuple[CompiledPackage, ...] = ()


class CopiedFile(Closed):
    """A file that is copied into the image."""

    source: str
    target: AbsolutePath
    mode: Annotated[str, StringConstraints(pattern=r"^0[0-7]{3}$")] = "0644"


class SelfTest(Closed):
    """A Python script that the finished image must pass; it prints one JSON object as its last line.

    Args:
        script: The file. It is in the image, too, so that `hpcutils image test` can run it at any time.
        ranks: How many MPI ranks run it together.
    """

    script: str
    ranks: int = Field(default=1, ge=1, le=64, strict=True)


class Recipe(Closed):
    """A whole recipe."""

    name: RecipeName
    summary: OneLine
    variant: VariantName
    base: Base
    system: System = System()
    python: Python
    compile: Compile
    environment: dict[VariableName, OneLine] = Field(default_factory=dict)
    labels: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+$")], OneLine] = Field(default_factory=dict)
    files: tuple[CopiedFile, ...] = ()
    self_test: tuple[SelfTest, ...] = Field(min_length=1)

    def compiled(self, name: str) -> CompiledPackage | None:
        """Return the compiled package called `name`."""
        return next((package for package in self.compile.packages if package.name == name), None)

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        problems = problems_of(self)
        if problems:
            raise UnfitPartsError(problems)
        return self


@dataclass(frozen=True)
class RecipeFiles:
    """A recipe and the contents of every file that it names: whatever follows needs no further look at the disk.

    Args:
        recipe: What was written, on top of what it extends.
        lock: Text of `python.lock` and of every `python.extra_locks`.
        compile_lock: Text of `compile.lock`.
        tools_lock: Text of `compile.tools_lock`.
        self_tests: Text of each of `recipe.self_test`, in their order.
        copied: Content of each of `recipe.files`, in their order.
        archive: Where an `ArchiveBase` is: too large to carry about; its digest is in the recipe.
        debian_lock: Text of `system.lock` and of every `system.extra_locks`.
    """

    recipe: Recipe
    lock: str
    compile_lock: str
    tools_lock: str
    self_tests: tuple[str, ...]
    copied: tuple[bytes, ...] = field(default=())
    archive: Path | None = None
    debian_lock: str = ""
