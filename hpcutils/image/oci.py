"""Building an image for Docker and its kin: the Dockerfile, built into an OCI archive by whatever program works here."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hpcutils.errors import ImageError
from hpcutils.image.caller import plain_environment
from hpcutils.image.code import CodeFile, write_code
from hpcutils.image.layers import Workbench, check_archive, fill_build_folder, keep_wheels, show
from hpcutils.image.machine import without_addresses
from hpcutils.image.render import BASE_ARCHIVE, dockerfile
from hpcutils.shell import run, stream
from hpcutils.specs.recipe import ArchiveBase, DebianBase, RecipeFiles


@dataclass(frozen=True)
class Engine:
    """A program that builds Dockerfiles, with storage of this build's own where it can have one.

    Args:
        name: `docker`, `buildah` or `podman`.
        program: Its path.
        folder: The build's temporary folder.
        network: Variables with which it reaches registries.
    """

    name: str
    program: str
    folder: Path
    network: Mapping[str, str] = field(default_factory=dict)

    def words(self) -> list[str]:
        """Return the program and where it keeps its layers: in the build's folder, so that nothing is left behind."""
        if self.name == "docker":
            return [self.program]
        storage = ["--root", str(self.folder / "storage"), "--runroot", str(self.folder / "storage-run")]
        # vfs copies whole layers, and works on every file system without a privilege.
        return [self.program, *storage, "--storage-driver", "vfs"]

    def environment(self) -> dict[str, str]:
        """Return the environment of its commands: what they keep while they run goes into the build's folder, too."""
        (self.folder / "run").mkdir(mode=0o700, exist_ok=True)
        folders = {"TMPDIR": str(self.folder), "XDG_RUNTIME_DIR": str(self.folder / "run")}
        return plain_environment(**self.network, **folders, BUILDAH_ISOLATION="chroot")

    def build_words(self, tag: str, target: Path) -> list[str]:
        """Return the command that builds the folder's Dockerfile; with `docker` the archive is its result."""
        contexts = [word for name in ("build", "code") for word in ("--build-context", f"{name}={self.folder / CONTEXTS[name]}")]
        file = ["--file", str(self.folder / "context/Dockerfile")]
        if self.name == "docker":
            words, output = ["buildx", "build", "--progress", "plain"], ["--output", f"type=oci,dest={target}"]
            return [*self.words(), *words, *file, *contexts, *output, str(self.folder / "context")]
        # chroot needs no namespaces but the user's own: it works inside of other containers.
        options = ["--isolation", "chroot", "--format", "oci", "--tag", tag]
        return [*self.words(), "build", *options, *file, *contexts, str(self.folder / "context")]

    def save_words(self, tag: str, target: Path) -> list[str]:
        """Return the command that writes the archive; empty for `docker`, which has written it."""
        return [] if self.name == "docker" else [*self.words(), "push", "--quiet", tag, f"oci-archive:{target}:{tag}"]


CONTEXTS = {"build": "mnt", "code": "code"}


def make_oci(
    files: RecipeFiles, code: Sequence[CodeFile], base: Path, wheels: Path, result: Path, engine: Engine, bench: Workbench
) -> None:
    """Write `result`: the recipe's image as an OCI archive.

    Args:
        files: The recipe.
        code: hpcutils' own code, and the self-tests.
        base: The base.
        wheels: Folder of compiled wheels: used when it is there, made when it is not.
        result: Where the archive goes.
        engine: What builds.
        bench: What it is made with.

    Raises:
        ImageError: The build failed; its last lines are in the message.
    """
    if isinstance(files.recipe.base, ArchiveBase) and engine.name == "docker":
        raise ImageError("Docker cannot build on an archive", "load it, push it to a registry, and name it as base.image")
    check_archive(files)
    fill_build_folder(files, bench.folder, wheels, bench.machine)
    _fill_context(files, code, base, bench.folder)
    tag, environment = f"localhost/{files.recipe.name}:latest", engine.environment()
    try:
        stream(engine.build_words(tag, result), show, env=environment, error=ImageError, shown=without_addresses)
    finally:
        keep_wheels(bench.folder / "mnt/wheels", wheels)
    saving = engine.save_words(tag, result)
    if saving:
        run(saving, env=environment, error=ImageError)


@contextmanager
def entering(engine: Engine, archive: Path) -> Iterator[list[str]]:
    """Yield the words that run a program inside an OCI archive; the container is gone afterwards."""
    environment = engine.environment()
    if engine.name == "buildah":
        name = run([*engine.words(), "from", "--quiet", f"oci-archive:{archive}"], env=environment, error=ImageError).stdout.strip()
        try:
            # Of its own, chroot gives a container nothing in /dev/shm to write to.
            yield [*engine.words(), "run", "--isolation", "chroot", "--volume", "/dev/shm:/dev/shm", name, "--"]
        finally:
            run([*engine.words(), "rm", name], env=environment, check=False)
        return
    loaded = run([*engine.words(), "load", "--input", str(archive)], env=environment, error=ImageError).stdout
    tag = loaded.strip().splitlines()[-1].partition(": ")[2]
    yield [*engine.words(), "run", "--rm", "--ipc=host", tag]


def _fill_context(files: RecipeFiles, code: Sequence[CodeFile], base: Path, folder: Path) -> None:
    """Make the folder of the Dockerfile, and that of the code."""
    context = folder / "context"
    context.mkdir()
    (folder / "files").rename(context / "files")
    (context / "Dockerfile").write_text(dockerfile(files.recipe), encoding="utf-8")
    (folder / "code").mkdir()
    write_code(code, folder / "code")
    if isinstance(files.recipe.base, DebianBase):
        _copy_without_devices(base, context / BASE_ARCHIVE)
    elif isinstance(files.recipe.base, ArchiveBase):
        shutil.copyfile(base, context / BASE_ARCHIVE)


def _copy_without_devices(source: Path, target: Path) -> None:
    """Copy a tar but for its device files: an ordinary user cannot make them, and every engine brings its own."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            if not member.isdev():
                new.addfile(member, old.extractfile(member) if member.isreg() else None)
