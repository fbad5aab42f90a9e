"""Recipe → ordered steps → Apptainer definition or Dockerfile. Pure: no disk, no clock, no environment.

Both formats come from the same steps. While a step runs, the folder `/mnt` of the image is a folder of the machine that builds:

    /mnt/settings.sh      how apt and pip reach their servers from here (absent where the defaults do)
    /mnt/locks/*.txt      the locks; compile-NAME.txt has one compiled package each
    /mnt/locks/apt        the Debian lock, as apt's preferences: nothing else can be installed
    /mnt/wheels/*.whl     wheels of an earlier build with equal inputs (absent the first time)

It is not part of the image, and neither is anything in it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from hpcutils.specs.recipe import ArchiveBase, CompiledPackage, CopiedFile, DebianBase, ImageBase, Recipe

ENVIRONMENT = "/opt/hpcutils-env"
PYTHON = f"{ENVIRONMENT}/bin/python3"
SOURCE = "/hpcutils-src"
DEBIAN_LOCK = "/mnt/locks/apt"
WHEELS_MARK = "/mnt/wheels/.complete"
BASE_ARCHIVE = "base.tar"
# The date that a base gives to its own files.
DATE = "2025-01-01 00:00:00 UTC"

PIP = f"{ENVIRONMENT}/bin/pip"
# Compiled in one go afterwards: pip would write the hour of the build into each file.
PIP_INSTALL = (PIP, "install", "--no-cache-dir", "--no-compile", "--no-deps", "--require-hashes", "--only-binary=:all:")
PIP_WHEEL = (
    *(PIP, "wheel", "--no-cache-dir", "--no-deps", "--require-hashes", "--no-binary=:all:", "--no-build-isolation"),
    "--wheel-dir=/opt/wheels",
)
MACHINE_SETTINGS = ("export DEBIAN_FRONTEND=noninteractive", "if [ -e /mnt/settings.sh ]; then . /mnt/settings.sh; fi")
LEAKING_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE")


@dataclass(frozen=True)
class Step:
    """Lines of POSIX shell that belong together.

    Args:
        title: What they are for.
        lines: The lines; one that ends in a backslash goes on in the next.
        needs_build_folder: Whether they read `/mnt`, or reach a server as its settings say.
    """

    title: str
    lines: tuple[str, ...]
    needs_build_folder: bool = True


@dataclass(frozen=True)
class Stage:
    """Steps on a fresh copy of the base.

    Args:
        name: Name of the stage.
        steps: In the order in which they run.
        taken: Folder that is copied from the stage before, or `None`.
    """

    name: str
    steps: tuple[Step, ...]
    taken: str | None = None


def stages(recipe: Recipe) -> tuple[Stage, Stage]:
    """Return the two stages of an image: one that compiles, and the image itself, which takes only the result."""
    compiled = (_compile(recipe), _install_compiled()) if recipe.compile.packages else ()
    base = _base_packages(recipe)
    compiling = Stage("python", (*base, _install_locked(), *compiled, _settle_environment()))
    steps = (*base, _system(recipe), *_modes(recipe), _paths(recipe))
    return compiling, Stage("image", tuple(step for step in steps if step.lines), taken=ENVIRONMENT)


def file_name(index: int, file: CopiedFile) -> str:
    """Return what a copied file is called in the folder of the build: two may have the same name of their own."""
    return f"files/{index}-{file.target.rpartition('/')[2]}"


def definition(recipe: Recipe) -> str:
    """Return the Apptainer definition of the recipe's environment (hpcutils' own code is appended to the built image)."""
    blocks = [f"# {recipe.name}: {recipe.summary}", "# Rendered from the recipe; change that, not this."]
    for stage in stages(recipe):
        blocks += ["", *_definition_stage(recipe, stage)]
    blocks += ["", "%environment", *_indented(_environment(recipe))]
    blocks += ["", "%labels", *_indented(f"{key} {value}" for key, value in _labels(recipe).items())]
    return "\n".join(blocks) + "\n"


def dockerfile(recipe: Recipe) -> str:
    """Return the Dockerfile of the same steps; its contexts `build` and `code` are the folder `/mnt` and hpcutils' own code."""
    lines = [f"# {recipe.name}: {recipe.summary}", "# Rendered from the recipe; change that, not this.", "", *_docker_base(recipe)]
    for stage in stages(recipe):
        lines += ["", f"FROM base AS {stage.name}", *_docker_copies(recipe, stage)]
        for step in stage.steps:
            lines += ["", *_docker_step(step)]
    values = {"PATH": f"{ENVIRONMENT}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **recipe.environment}
    lines += ["", *(f"ENV {key}={_docker_quote(value)}" for key, value in values.items())]
    lines += ["", *(f"LABEL {key}={_docker_quote(value)}" for key, value in _labels(recipe).items())]
    # Nobody can write a .pyc in the image later; they go by content, as dates are the builder's.
    compiling = f"RUN {PYTHON} -m compileall -q --invalidation-mode unchecked-hash {SOURCE}"
    lines += ["", f"COPY --from=code / {SOURCE}/", compiling]
    return "\n".join(lines) + "\n"


def _base_packages(recipe: Recipe) -> tuple[Step, ...]:
    """A bootstrapped base has its packages from the start."""
    if isinstance(recipe.base, DebianBase) or not recipe.base.packages:
        return ()
    return (Step("what the base lacks, in the versions of the lock", _apt_install(recipe.base.packages)),)


def _install_locked() -> Step:
    lines = (f"python3 -m venv {ENVIRONMENT}", *_command(*PIP_INSTALL, "--requirement", "/mnt/locks/packages.txt"))
    return Step("Python packages, every file checked against its hash in the lock", lines)


def _compile(recipe: Recipe) -> Step:
    """Compile side by side (one package configures while another compiles), unless equal wheels are there."""
    packages = recipe.compile.packages
    names = " and ".join(f"{p.name} {p.version}" for p in packages)
    work = [
        *_apt_install(recipe.compile.system_packages),
        *_command(*PIP_INSTALL, "--target", "/opt/tools", "--requirement", "/mnt/locks/tools.txt"),
        *(f"ln -s {target} {path}" for path, target in recipe.compile.links.items()),
        "export PYTHONPATH=/opt/tools MAKEFLAGS=-j$(nproc)",
        *(line for package in packages for line in _wheel(package)),
        # All are waited for before one that failed ends the build: none may go on behind its back.
        "failed=0",
        *(f"wait ${_variable(package)} || failed=1" for package in packages),
        "[ $failed = 0 ]",
        "unset PYTHONPATH",
        # Kept for the next build; a builder that shows /mnt read-only does without.
        f"if [ -w /mnt ]; then cp -r /opt/wheels /mnt/ && touch {WHEELS_MARK}; fi",
    ]
    lines = (f"if [ -e {WHEELS_MARK} ]; then", "    cp -r /mnt/wheels /opt/wheels", "else", *_indented(work), "fi")
    return Step(f"{names}, compiled against the packages above", lines)


def _wheel(package: CompiledPackage) -> tuple[str, ...]:
    variables = [f"{key}={shlex.quote(value)}" for key, value in package.environment.items()]
    lock = f"/mnt/locks/compile-{package.name}.txt"
    return _command("env", *variables, *PIP_WHEEL, "--requirement", lock, f"& {_variable(package)}=$!")


def _apt_install(packages: tuple[str, ...]) -> tuple[str, ...]:
    leftovers = "rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/* /var/log/*"
    locked = ("-o", f"Dir::Etc::Preferences={DEBIAN_LOCK}")
    install = _command("apt-get", "install", "--yes", "--no-install-recommends", *locked, *packages)
    return ("apt-get update", *install, leftovers) if packages else ()


def _command(*words: str) -> tuple[str, ...]:
    """Return one command as lines of at most about 110 characters; words are never broken, whatever is in them."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < 110:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return (*(f"{line} \\" for line in lines[:-1]), lines[-1])


def _indented(lines: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"    {line}" for line in lines)


def _variable(package: CompiledPackage) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in package.name) + "_job"


def _install_compiled() -> Step:
    line = f"{PIP} install --no-cache-dir --no-compile --no-deps --no-index /opt/wheels/*.whl"
    return Step("the compiled packages", (line,))


def _settle_environment() -> Step:
    """Equal packages become equal files: compiled by content, not by date, and all of one date."""
    lines = (
        f"{PIP} uninstall --yes pip",
        # Some packages have templates that are no Python; pip passes over them, too.
        f"python3 -m compileall -q -f -j 0 --invalidation-mode unchecked-hash {ENVIRONMENT}/lib >/dev/null || true",
        _dated(ENVIRONMENT),
    )
    return Step("nothing is installed into a finished image; compiled files, and dates", lines, False)


def _dated(*folders: str) -> str:
    """Return the line that gives whatever was written just now the one date that files without a date of their own have."""
    return f"find {' '.join(folders)} -xdev -newermt '{DATE}' -exec touch -h -d '{DATE}' {{}} +"


def _system(recipe: Recipe) -> Step:
    # A squashfs keeps whole seconds, fontconfig's index keeps nanoseconds: without this every `dot` would index the fonts anew,
    # and complain that it cannot keep the result.
    folders = "/usr/share/fonts /usr/local/share/fonts"
    dated = f"mkdir -p {folders}; find {folders} -type d -exec touch -d '{DATE}' {{}} +"
    fonts = f"if command -v fc-cache; then {dated}; fc-cache -sf; {_dated('/etc/fonts')}; fi"
    install = _apt_install(recipe.system.packages)
    return Step("system packages, in the versions of the lock", (*install, fonts, _dated("/usr", "/var")) if install else ())


def _modes(recipe: Recipe) -> tuple[Step, ...]:
    if not recipe.files:
        return ()
    return (Step("modes of copied files", tuple(f"chmod {file.mode} {file.target}" for file in recipe.files), False),)


def _paths(recipe: Recipe) -> Step:
    """Let both Pythons of the image find both folders: mpirun puts the system's one first in PATH."""
    version = recipe.python.version
    packages = f"{ENVIRONMENT}/lib/python{version}/site-packages"
    system = f"/usr/local/lib/python{version}/dist-packages"
    lines = (
        f"echo {SOURCE} > {packages}/hpcutils.pth",
        f"mkdir -p {system}",
        f"echo 'import site; site.addsitedir(\"{packages}\")' > {system}/hpcutils-env.pth",
        f"ln -sf {SOURCE}/bin/hpcutils /usr/local/bin/hpcutils",
    )
    return Step("where Python finds the packages, and hpcutils' own code, which comes last", lines, False)


def _definition_stage(recipe: Recipe, stage: Stage) -> list[str]:
    lines = _definition_base(recipe, stage.name)
    if stage.taken is not None:
        lines += ["", "%files from python", f"    {stage.taken} {stage.taken}"]
        if recipe.files:
            lines += ["", "%files", *(f"    {file_name(i, file)} {file.target}" for i, file in enumerate(recipe.files))]
    lines += ["", "%post", "    set -eu", *_indented(MACHINE_SETTINGS)]
    for step in stage.steps:
        lines += ["", f"    # {step.title}", f"    echo 'step: {_plain(step.title)}'", *_indented(step.lines)]
    return lines


def _definition_base(recipe: Recipe, stage: str) -> list[str]:
    if isinstance(recipe.base, ImageBase):
        return ["Bootstrap: docker", f"From: {recipe.base.image}", f"Stage: {stage}"]
    if isinstance(recipe.base, ArchiveBase):
        return ["Bootstrap: oci-archive", f"From: {BASE_ARCHIVE}", f"Stage: {stage}"]
    return [
        "Bootstrap: scratch",
        f"Stage: {stage}",
        "",
        "%setup",
        "    # The base: bootstrapped from its packages beforehand. An ordinary user cannot make device files, nor needs them.",
        f"    tar -C \"$APPTAINER_ROOTFS\" --no-same-owner --exclude './dev/*' -xf {BASE_ARCHIVE}",
    ]


def _docker_base(recipe: Recipe) -> list[str]:
    if isinstance(recipe.base, ImageBase):
        return [f"FROM {recipe.base.image} AS base"]
    if isinstance(recipe.base, ArchiveBase):
        return ["# buildah and podman read an archive; Docker has to load it first.", f"FROM oci-archive:{BASE_ARCHIVE} AS base"]
    return ["# The base: bootstrapped from its packages beforehand.", "FROM scratch AS base", f"ADD {BASE_ARCHIVE} /"]


def _plain(title: str) -> str:
    return title.replace("'", "")


def _docker_step(step: Step) -> list[str]:
    """One RUN; shell lines are joined by `;`, except where a compound command goes on."""
    told = f"echo 'step: {_plain(step.title)}'"
    lines = ["set -eu", told, *(MACHINE_SETTINGS if step.needs_build_folder else ()), *step.lines]
    mount = "--mount=type=bind,from=build,target=/mnt " if step.needs_build_folder else ""
    body = "\n".join([*(f"    {_docker_line(line)}" for line in lines[:-1]), f"    {lines[-1]}"])
    return [f"# {step.title}", f"RUN {mount}\\\n{body}"]


def _docker_line(line: str) -> str:
    if line.endswith("\\"):
        return line
    return f"{line} \\" if line.endswith((" then", "else", " do")) else f"{line}; \\"


def _docker_copies(recipe: Recipe, stage: Stage) -> list[str]:
    if stage.taken is None:
        return []
    copied = [f"COPY {file_name(i, file)} {file.target}" for i, file in enumerate(recipe.files)]
    return [f"COPY --from=python {stage.taken} {stage.taken}", *copied]


def _docker_quote(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
    return f'"{escaped}"'


def _environment(recipe: Recipe) -> list[str]:
    return [
        f"export PATH={ENVIRONMENT}/bin:$PATH",
        *(f"export {key}={shlex.quote(value)}" for key, value in recipe.environment.items()),
        "# Apptainer hands on the caller's variables: none of these may lead Python out of the image. It ignores `unset`.",
        *(f"export {name}=" for name in LEAKING_VARIABLES),
    ]


def _labels(recipe: Recipe) -> dict[str, str]:
    own = {"org.opencontainers.image.title": recipe.name, "org.opencontainers.image.description": recipe.summary}
    return {"hpcutils.recipe": recipe.name, "hpcutils.variant": recipe.variant, **own, **recipe.labels}
