"""Making the layers of an image: the base, the environment, the code on top. What is made is decided in build.py."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcutils.errors import ImageError
from hpcutils.fs import publishing, write_text
from hpcutils.hashing import digest_file
from hpcutils.image.apt import installed_versions, preferences
from hpcutils.image.base import bootstrap_argv, bootstrap_environment
from hpcutils.image.caller import plain_environment
from hpcutils.image.code import DATE_S, CodeFile, settle_dates, write_code
from hpcutils.image.digest import debian_lock
from hpcutils.image.exec_line import bind, exec_argv
from hpcutils.image.machine import Machine, apt_options, build_files, network, proxies, sources_text, without_addresses
from hpcutils.image.render import BASE_ARCHIVE, DEBIAN_LOCK, PYTHON, SOURCE, definition, file_name
from hpcutils.image.sif import append_folder
from hpcutils.log import LOGGER
from hpcutils.shell import run, stream
from hpcutils.specs.debian import NO_VERSION, DebianLock
from hpcutils.specs.recipe import ArchiveBase, DebianBase, RecipeFiles
from hpcutils.specs.recipe_file import locked

# Packs the environment (1.7 GB) in 11 s of one core where gzip takes 166, into 2 % more bytes. Linux reads it since 4.14.
MKSQUASHFS_ARGUMENTS = "-comp zstd -Xcompression-level 3"


@dataclass(frozen=True)
class Workbench:
    """What every layer is made with.

    Args:
        builder: Apptainer.
        folder: The build's temporary folder.
        machine: How this machine reaches package servers.
    """

    builder: str
    folder: Path
    machine: Machine


def make_base(base: DebianBase, lock: DebianLock, archive: Path, bench: Workbench) -> None:
    """Bootstrap the distribution into `archive` (a tar), with its sha256 beside it.

    Args:
        base: What is asked for.
        lock: The version of each package.
        archive: Where the tar goes.
        bench: What it is made with.

    Raises:
        ImageError: The bootstrap failed, or made something else than the recipe says.
        MissingPartError: There is no mmdebstrap.
    """
    sources, temporary = bench.folder / "sources.list", bench.folder / "bootstrap"
    _write_private(sources, sources_text(bench.machine, base.suite))
    # mmdebstrap's root user is another user out here: it must be able to pass.
    temporary.mkdir(mode=0o755)
    settings = bench.folder / "base-settings"
    settings.mkdir(mode=0o755)
    (settings / "apt.conf").write_text("".join(f"{line}\n" for line in apt_options(bench.machine)), encoding="utf-8")
    (settings / "preferences").write_text(preferences(lock.versions(), only=True), encoding="utf-8")
    with publishing(archive) as target:
        argv = bootstrap_argv(base, sources, target, settings)
        environment = plain_environment(**proxies(bench.machine), **bootstrap_environment(base, temporary))
        stream(argv, LOGGER.debug, env=environment, error=ImageError, shown=without_addresses)
        check_versions("the base", versions_in_archive(target), lock.base, exactly=True)
        found = digest_file(target)
        if base.sha256 not in (None, found):
            raise ImageError(f"the base has sha256 {found}, the recipe says {base.sha256}", "the distribution has moved on")
    write_text(archive.with_suffix(".json"), json.dumps({"sha256": found}) + "\n")


def versions_in_archive(archive: Path) -> dict[str, str]:
    """Return the Debian packages of a base's archive, with versions."""
    with tarfile.open(archive) as tar:
        status = tar.extractfile("./var/lib/dpkg/status")
        assert status is not None
        return installed_versions(status.read().decode("utf-8"))


def check_versions(what: str, found: Mapping[str, str], locked_ones: Mapping[str, str], *, exactly: bool = False) -> None:
    """Hold the packages of something that was built against the lock.

    Args:
        what: How the message calls it.
        found: Its packages.
        locked_ones: Those of the lock.
        exactly: Whether each package of the lock has to be there, too.

    Raises:
        ImageError: There is another version, or a package that the lock does not have.
    """
    names = sorted({*found, *(locked_ones if exactly else ())})
    wrong = [
        f"  {name}: {found.get(name, NO_VERSION)}, the lock says {locked_ones.get(name, NO_VERSION)}"
        for name in names
        if found.get(name) != locked_ones.get(name)
    ]
    if wrong:
        raise ImageError("\n".join([f"{what} has other Debian packages than the lock:", *wrong]), "renew it: hpcutils image lock")


def check_archive(files: RecipeFiles) -> None:
    """Raise `ImageError` where the archive that a recipe stands on is not the one that it names."""
    if not isinstance(files.recipe.base, ArchiveBase) or files.archive is None:
        return
    found = digest_file(files.archive)
    if found != files.recipe.base.sha256:
        raise ImageError(f"{files.archive} has sha256 {found}, the recipe says {files.recipe.base.sha256}", "mend base.sha256")


def make_environment(files: RecipeFiles, archive: Path, wheels: Path, result: Path, bench: Workbench) -> None:
    """Build the SIF that has everything but hpcutils' own code.

    Args:
        files: The recipe.
        archive: The base.
        wheels: Folder of compiled wheels: used when it is there, made when it is not.
        result: Where the SIF goes.
        bench: What it is made with.

    Raises:
        ImageError: The build failed; its last lines are in the message.
    """
    work = bench.folder
    check_archive(files)
    binds = fill_build_folder(files, work, wheels, bench.machine)
    (work / BASE_ARCHIVE).symlink_to(archive)
    (work / "environment.def").write_text(definition(files.recipe), encoding="utf-8")
    (work / "apptainer").mkdir()
    places = {"TMPDIR": work / "apptainer", "CACHEDIR": work / "apptainer/cache"}
    # Singularity knows its own names only.
    folders = {f"{program}_{key}": str(place) for program in ("APPTAINER", "SINGULARITY") for key, place in places.items()}
    environment = plain_environment(**network(bench.machine), **folders)
    try:
        with publishing(result, suffix=".sif") as target:
            words = [word for path in binds for word in ("--bind", path)]
            argv = [bench.builder, "build", "--mksquashfs-args", MKSQUASHFS_ARGUMENTS, *words, str(target), "environment.def"]
            stream(argv, show, env=environment, cwd=work, error=ImageError, shown=without_addresses)
    finally:
        keep_wheels(work / "mnt/wheels", wheels)


def make_image(code: tuple[CodeFile, ...], environment: Path, result: Path, bench: Workbench) -> None:
    """Write `result`: the environment's SIF with hpcutils' own code added, compiled for the image's Python."""
    top = bench.folder / "top"
    folder = top / SOURCE.strip("/")
    write_code(code, folder)
    # Nobody can write a .pyc in the image later. They go by content, as the dates are settled below.
    compiling = [PYTHON, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", SOURCE]
    argv = exec_argv(environment, [bind(folder, SOURCE)], program=bench.builder)
    run([*argv, *compiling], env=plain_environment(), error=ImageError)
    settle_dates(top)
    append_folder(bench.builder, environment, top, result, bench.folder, DATE_S)


def versions(name: str, version: str, tools: Iterable[str]) -> dict[str, str]:
    """Return the versions of the programs that build: of the builder, which is known, and of the others."""
    option = {"mksquashfs": "-version"}
    lines = {tool: run([tool, option.get(tool, "--version")], check=False).stdout.splitlines() for tool in tools}
    return {name: version, **{tool: output[0] if output else "unknown" for tool, output in lines.items()}}


def fill_build_folder(files: RecipeFiles, work: Path, wheels: Path, machine: Machine) -> list[str]:
    """Write what the build sees as `/mnt` and return the binds that show it, and a `/tmp` of the build's own."""
    folder = work / "mnt"
    settings = build_files(machine, files.recipe.base.suite)
    locks = {"packages": files.lock, "tools": files.tools_lock}
    debian = preferences(debian_lock(files).versions(), only=True)
    locks |= {f"compile-{name}": entry for name, entry in locked(files.compile_lock).items()}
    (folder / "locks").mkdir(parents=True)
    files_of_locks = {f"locks/{name}.txt": text for name, text in locks.items()}
    for name, text in {**settings.texts, **files_of_locks, DEBIAN_LOCK.removeprefix("/mnt/"): debian}.items():
        _write_private(folder / name, text)
    for name, source in settings.copies.items():
        shutil.copyfile(source, folder / name)
    if wheels.is_dir():
        shutil.copytree(wheels, folder / "wheels")
    (work / "files").mkdir()
    for i, (file, content) in enumerate(zip(files.recipe.files, files.copied, strict=True)):
        (work / file_name(i, file)).write_bytes(content)
    for inside in settings.binds.values():
        (folder / inside.removeprefix("/mnt/")).mkdir(parents=True)
    # Apptainer shows the machine's own /tmp while it builds: others clear it away under pip's feet, and pip leaves things there.
    scratch = work / "tmp"
    scratch.mkdir()
    scratch.chmod(0o1777)
    return [
        bind(folder, "/mnt"),
        bind(scratch, "/tmp"),
        bind(scratch, "/var/tmp"),
        *(bind(source, inside, read_only=True) for source, inside in settings.binds.items()),
    ]


def keep_wheels(made: Path, wheels: Path) -> None:
    """Give freshly compiled wheels their place, also when a later step failed: they take longest."""
    if wheels.is_dir() or not (made / ".complete").exists():
        return
    try:
        with publishing(wheels) as temporary:
            shutil.copytree(made, temporary)
    except OSError:
        # Another recipe with equal wheels was faster: a folder does not take the place of one that has something in it.
        if not wheels.is_dir():
            raise


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")


def show(line: str) -> None:
    """Tell a line of a build's output: the steps for everybody, the rest for those who ask."""
    # buildx puts a number and the time in front.
    step = re.match(r"(?:#\d+ [\d.]+ )?step: (.*)", line)
    if step is not None:
        LOGGER.info(f"  {step[1]}")
    else:
        LOGGER.debug(without_addresses(line))
