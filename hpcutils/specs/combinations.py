"""Which parts of a recipe go together: each check returns what is wrong, the key it is about, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcutils.specs.recipe import CompiledPackage, Recipe

Location = tuple[str | int, ...]
Problem = tuple[Location, str]

TENSORFLOW_NAMES = ("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tensorflow-intel", "tensorflow-rocm")
# Horovod up to 0.28.1, the last release, compiles against TensorFlow up to 2.18: later ones ship no headers that it includes.
HOROVOD_LAST, NEWEST_TENSORFLOW = (0, 28, 1), (2, 18)
NCCL = "nvidia-nccl-"
# What the image itself says, or what must not lead Python out of it, with the reason.
OWN_VARIABLES = {
    "PATH": "the image puts its own Python first; programs belong in a folder that is there already, as /usr/local/bin",
    **dict.fromkeys(
        ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE"),
        "it could lead Python out of the image, so a SIF empties it; Python packages belong in python.lock",
    ),
}
# Folders of the machine that builds or runs, or of hpcutils: a file that is copied there is not seen.
FOREIGN_FOLDERS = ("/mnt", "/hpcutils-src", "/tmp", "/var/tmp", "/proc", "/sys", "/dev", "/run", "/.singularity.d")


class UnfitPartsError(ValueError):
    """A recipe whose parts do not go together.

    Args:
        problems: Each with the key that it is about.
    """

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(message for _, message in problems))
        self.problems = problems


@dataclass(frozen=True)
class VariantRules:
    """What images of one kind of machine have in common.

    Args:
        tensorflow: Names under which a TensorFlow for it is distributed.
        flags: Variables that Horovod's build must have: without them it compiles, and then sums over the CPU.
        gpu: Values that `HOROVOD_GPU` may have.
        needs_nccl: Whether NCCL comes as a wheel, and has to be one of the locked packages.
    """

    tensorflow: tuple[str, ...]
    flags: Mapping[str, str] = field(default_factory=dict)
    gpu: tuple[str, ...] = ()
    needs_nccl: bool = False


VARIANTS: Mapping[str, VariantRules] = {
    "cpu": VariantRules(("tensorflow-cpu", "tensorflow")),
    "cuda": VariantRules(("tensorflow",), {"HOROVOD_GPU_OPERATIONS": "NCCL"}, gpu=("CUDA",), needs_nccl=True),
    "rocm": VariantRules(("tensorflow-rocm",), {"HOROVOD_GPU": "ROCM", "HOROVOD_GPU_OPERATIONS": "NCCL"}, gpu=("ROCM",)),
}


def problems_of(recipe: Recipe) -> list[Problem]:
    """Return everything in a recipe that does not go together."""
    return [problem for check in CHECKS for problem in check(recipe)]


def _pinned(recipe: Recipe) -> dict[str, str]:
    """Return the versions of TensorFlow in the pins, by its name."""
    return {name: recipe.python.pins[name] for name in TENSORFLOW_NAMES if name in recipe.python.pins}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _where(recipe: Recipe, package: CompiledPackage, *rest: str) -> Location:
    return ("compile", "packages", recipe.compile.packages.index(package), *rest)


def _horovod_fits_tensorflow(recipe: Recipe) -> Iterator[Problem]:
    horovod = recipe.compiled("horovod")
    if horovod is None:
        return
    if not _pinned(recipe):
        yield ("python", "pins"), "horovod is compiled against TensorFlow: give TensorFlow's version in python.pins"
    for name, version in _pinned(recipe).items():
        if _numbers(horovod.version) <= HOROVOD_LAST and _numbers(version)[:2] > NEWEST_TENSORFLOW:
            yield (
                ("python", "pins", name),
                f"{name} {version} with horovod {horovod.version}: TensorFlow 2.19 and later no longer ship the LLVM and XLA "
                f"headers that Horovod {horovod.version} includes; the newest that it compiles against is 2.18",
            )


def _tensorflow_fits_variant(recipe: Recipe) -> Iterator[Problem]:
    fitting = VARIANTS[recipe.variant].tensorflow
    for name in _pinned(recipe):
        if name not in fitting:
            yield (
                ("python", "pins", name),
                f"variant {recipe.variant!r} with {name}: its TensorFlow is distributed as {' or '.join(fitting)}",
            )
    if len(_pinned(recipe)) > 1:
        yield ("python", "pins"), f"{' and '.join(_pinned(recipe))} write the same files: one TensorFlow was expected"


def _horovod_fits_variant(recipe: Recipe) -> Iterator[Problem]:
    horovod, rules = recipe.compiled("horovod"), VARIANTS[recipe.variant]
    if horovod is None:
        return
    where = _where(recipe, horovod, "environment")
    for name, value in rules.flags.items():
        if horovod.environment.get(name) != value:
            flag = f"{name}={value}"
            yield where, f"variant {recipe.variant!r}: Horovod is to be compiled with {flag}, else it sums gradients on the CPU"
    gpu = horovod.environment.get("HOROVOD_GPU")
    if rules.gpu and gpu not in (None, *rules.gpu):
        yield (*where, "HOROVOD_GPU"), f"variant {recipe.variant!r}: Horovod cannot be compiled with HOROVOD_GPU={gpu}"
    for name in horovod.environment:
        if not rules.gpu and name.startswith("HOROVOD_GPU"):
            yield (*where, name), f"variant 'cpu': Horovod cannot be compiled with {name}: there is no CUDA or ROCm in the image"


def _horovod_belongs_to_its_tensorflow(recipe: Recipe) -> Iterator[Problem]:
    """Its wheel is kept by what is in built_against: one of another TensorFlow or NCCL loads, and crashes later."""
    horovod = recipe.compiled("horovod")
    if horovod is None:
        return
    where = _where(recipe, horovod, "built_against")
    for name in _pinned(recipe):
        if name not in horovod.built_against:
            yield where, f"horovod is compiled against {name}: name it in its built_against"
    if not VARIANTS[recipe.variant].needs_nccl:
        return
    nccl = [name for name in recipe.python.pins if name.startswith(NCCL)]
    if not nccl:
        yield ("python", "pins"), f"variant {recipe.variant!r}: Horovod is linked with NCCL: pin its wheel, {NCCL}cu12"
    for name in nccl:
        if name not in horovod.built_against:
            yield where, f"horovod is linked with {name}: name it in its built_against"


def _mpi_is_there(recipe: Recipe) -> Iterator[Problem]:
    """What is compiled against MPI needs its headers in one stage, and its libraries in the other."""
    wanting = [
        package.name
        for package in recipe.compile.packages
        if package.environment.get("HDF5_MPI") == "ON" or package.environment.get("HOROVOD_WITH_MPI") == "1"
    ]
    needed = {
        ("compile", "system_packages"): ("libopenmpi-dev", recipe.compile.system_packages),
        ("system", "packages"): ("openmpi-bin", recipe.system.packages),
    }
    for where, (name, there) in needed.items():
        if wanting and name not in there:
            yield where, f"{', '.join(wanting)} with MPI: {'.'.join(where)} has no {name}"


def _parallel_hdf5_has_mpi4py(recipe: Recipe) -> Iterator[Problem]:
    h5py = recipe.compiled("h5py")
    if h5py is not None and h5py.environment.get("HDF5_MPI") == "ON" and "mpi4py" not in h5py.built_against:
        where = _where(recipe, h5py, "built_against")
        yield where, "h5py with HDF5_MPI=ON hands mpi4py's communicators to HDF5: name mpi4py in its built_against"


def _variables_are_not_the_images_own(recipe: Recipe) -> Iterator[Problem]:
    for name, reason in OWN_VARIABLES.items():
        if name in recipe.environment:
            yield ("environment", name), f"{name} cannot be set: {reason}"


def _files_are_seen(recipe: Recipe) -> Iterator[Problem]:
    for i, file in enumerate(recipe.files):
        folder = next((f for f in FOREIGN_FOLDERS if f"{file.target}/".startswith(f"{f}/")), None)
        if folder is not None:
            yield ("files", i, "target"), f"{file.target}: nothing of {folder} stays in an image, or is seen when it runs"


def _nothing_is_said_twice(recipe: Recipe) -> Iterator[Problem]:
    lists: dict[Location, list[str]] = {
        ("base", "packages"): list(recipe.base.packages),
        ("system", "packages"): list(recipe.system.packages),
        ("compile", "system_packages"): list(recipe.compile.system_packages),
        ("compile", "packages"): [package.name for package in recipe.compile.packages],
        ("python", "extra_locks"): list(recipe.python.extra_locks),
        ("files",): [file.target for file in recipe.files],
    }
    for where, values in lists.items():
        for value in sorted({value for value in values if values.count(value) > 1}):
            yield where, f"{value} is named twice"


CHECKS = (
    _horovod_fits_tensorflow,
    _tensorflow_fits_variant,
    _horovod_fits_variant,
    _horovod_belongs_to_its_tensorflow,
    _mpi_is_there,
    _parallel_hdf5_has_mpi4py,
    _variables_are_not_the_images_own,
    _files_are_seen,
    _nothing_is_said_twice,
)
