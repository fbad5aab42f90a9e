"""A recipe: what goes into a container image. The types, and which of their combinations make sense.

`recipe_file` reads one from `containers/recipes/*.toml`, together with the recipe that it extends and all files that it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

# Text that is pasted into a build script: names only, nothing that a shell reads.
PackageName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+.:_-]*$")]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Version = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)*$")]
OneLine = Annotated[str, StringConstraints(pattern=r"^[^\n\r]*$")]
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/[A-Za-z0-9._/+-]+$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# A tag can lead to another image tomorrow: a digest is asked for.
ImageByDigest = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-zA-Z0-9._:/-]*@sha256:[0-9a-f]{64}$")]
Suite = Literal["bookworm"]
VariantName = Literal["cpu", "cuda", "rocm"]

TENSORFLOW_NAMES = ("tensorflow", "tensorflow-cpu", "tensorflow-rocm")
# Horovod 0.28.1 compiles against TensorFlow 2.15 to 2.18: later ones no longer ship headers that it includes.
HOROVOD_NEWEST_TENSORFLOW = {"0.28.1": (2, 18)}


@dataclass(frozen=True)
class VariantRules:
    """What images of one kind of machine have in common.

    Args:
        tensorflow: Names under which a TensorFlow for it is distributed.
        flags: Variables that Horovod's build must have: without them it compiles, and then sums over the CPU.
        forbidden: Variables that it must not have.
    """

    tensorflow: tuple[str, ...]
    flags: Mapping[str, str] = field(default_factory=dict)
    forbidden: tuple[str, ...] = ()


VARIANTS: Mapping[str, VariantRules] = {
    "cpu": VariantRules(("tensorflow-cpu", "tensorflow"), forbidden=("HOROVOD_GPU", "HOROVOD_GPU_OPERATIONS")),
    "cuda": VariantRules(("tensorflow",), {"HOROVOD_GPU_OPERATIONS": "NCCL"}),
    "rocm": VariantRules(("tensorflow-rocm",), {"HOROVOD_GPU": "ROCM", "HOROVOD_GPU_OPERATIONS": "NCCL"}),
}


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
    epoch: int = Field(ge=0)
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
    ranks: int = Field(default=1, ge=1, le=64)


class Recipe(Closed):
    """A whole recipe."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
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
        problems = [problem for check in COMBINATIONS for problem in check(self)]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _horovod_fits_tensorflow(recipe: Recipe) -> list[str]:
    horovod = recipe.compiled("horovod")
    if horovod is None:
        return []
    newest = HOROVOD_NEWEST_TENSORFLOW.get(horovod.version)
    given = {name: recipe.python.pins[name] for name in TENSORFLOW_NAMES if name in recipe.python.pins}
    if not given:
        return ["horovod is compiled against TensorFlow: give TensorFlow's version in python.pins"]
    return [
        f"{name} {version} with horovod {horovod.version}: TensorFlow 2.19 and later no longer ship the LLVM and XLA headers "
        f"that Horovod {horovod.version} includes; the newest that it compiles against is {'.'.join(map(str, newest))}"
        for name, version in given.items()
        if newest is not None and tuple(int(part) for part in version.split("."))[:2] > newest
    ]


def _tensorflow_fits_variant(recipe: Recipe) -> list[str]:
    fitting = VARIANTS[recipe.variant].tensorflow
    return [
        f"variant {recipe.variant!r} with {name}: its TensorFlow is distributed as {' or '.join(fitting)}"
        for name in TENSORFLOW_NAMES
        if name in recipe.python.pins and name not in fitting
    ]


def _horovod_fits_variant(recipe: Recipe) -> list[str]:
    horovod, rules = recipe.compiled("horovod"), VARIANTS[recipe.variant]
    if horovod is None:
        return []
    wrong = [f"{name}={value}" for name, value in rules.flags.items() if horovod.environment.get(name) != value]
    problems = [
        f"variant {recipe.variant!r}: Horovod is to be compiled with {flag}, else it sums gradients on the CPU" for flag in wrong
    ]
    return problems + [
        f"variant 'cpu': Horovod cannot be compiled with {name}: there is no CUDA or ROCm in the image"
        for name in rules.forbidden
        if name in horovod.environment
    ]


def _mpi_is_there(recipe: Recipe) -> list[str]:
    """What is compiled against MPI needs its headers in one stage, and its libraries in the other."""
    wanting = [
        package.name
        for package in recipe.compile.packages
        if package.environment.get("HDF5_MPI") == "ON" or package.environment.get("HOROVOD_WITH_MPI") == "1"
    ]
    if not wanting:
        return []
    there = {"compile.system_packages": recipe.compile.system_packages, "system.packages": recipe.system.packages}
    needed = {"compile.system_packages": "libopenmpi-dev", "system.packages": "openmpi-bin"}
    return [f"{', '.join(wanting)} with MPI: {key} has no {name}" for key, name in needed.items() if name not in there[key]]


def _parallel_hdf5_has_mpi4py(recipe: Recipe) -> list[str]:
    h5py = recipe.compiled("h5py")
    if h5py is None or h5py.environment.get("HDF5_MPI") != "ON" or "mpi4py" in h5py.built_against:
        return []
    return ["h5py with HDF5_MPI=ON hands mpi4py's communicators to HDF5: name mpi4py in its built_against"]


COMBINATIONS = (
    _horovod_fits_tensorflow,
    _tensorflow_fits_variant,
    _horovod_fits_variant,
    _mpi_is_there,
    _parallel_hdf5_has_mpi4py,
)


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
