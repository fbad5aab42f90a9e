"""Which programs can build images on this machine, and why the others cannot."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpcutils.errors import ImageError, MissingPartError
from hpcutils.image import find
from hpcutils.image.plan import Format
from hpcutils.image.workspace import NEEDED_BYTES
from hpcutils.shell import run

# In this order they are tried for each format.
NAMES: dict[Format, tuple[str, ...]] = {"apptainer": ("apptainer", "singularity"), "docker": ("docker", "buildah", "podman")}
# The first that know named contexts, which the folder of the build is.
OLDEST = {"buildah": (1, 26), "podman": (4, 2), "apptainer": (1, 2), "singularity": (3, 11)}
# Where unpacking a million small files takes an hour, or user namespaces may not write.
SLOW_FILE_SYSTEMS = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs"}
ANSWER_S = 20.0
SUBUID_HINT = "as root: apt-get install uidmap; usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
ARCHIVE_PROBLEM = "it cannot build on an archive: load that, push it to a registry, and name it as base.image"
DRIVER_PROBLEM = "its buildx driver 'docker' cannot write OCI archives ('docker buildx create --use' makes one that can)"
ROOT_PROBLEM = "root cannot build images here: this machine withholds some of root's capabilities"
ROOT_HINT = "build as an ordinary user that has a range in /etc/subuid and /etc/subgid (useradd gives one)"


@dataclass(frozen=True)
class Facts:
    """What builders ask of a machine.

    Args:
        problem: Why this user cannot build, and what helps; `None` when it can.
        ids: How many ids the user's namespace can have.
        fuse: Whether `/dev/fuse` can be opened.
        temporary: The temporary folder.
        file_system: Its file system's type.
        free_bytes: Its free space.
    """

    problem: tuple[str, str] | None
    ids: int
    fuse: bool
    temporary: Path
    file_system: str
    free_bytes: int

    def obstacle(self) -> str | None:
        """Return what keeps every builder from working, if anything does."""
        if self.problem is not None:
            return self.problem[0]
        if self.free_bytes < NEEDED_BYTES:
            return f"{self.temporary} has {self.free_bytes / 2**30:.1f} GiB free, a build needs {NEEDED_BYTES / 2**30:.0f}"
        return None

    def describe(self) -> str:
        """Return the facts in one line."""
        slow = ", which is slow with many small files" if self.file_system in SLOW_FILE_SYSTEMS else ""
        return (
            f"user namespaces with {self.ids} ids, /dev/fuse {'there' if self.fuse else 'missing'}, "
            f"{self.free_bytes / 2**30:.0f} GiB free in {self.temporary} ({self.file_system}{slow})"
        )


@dataclass(frozen=True)
class Finding:
    """One builder: whether it works here, and why.

    Args:
        name: Its name.
        format: What it builds.
        program: Its path; empty where there is none.
        version: Its version.
        works: Whether it can build here.
        why: The reason.
    """

    name: str
    format: Format
    program: str
    version: str
    works: bool
    why: str

    def describe(self) -> str:
        """Return the finding in one line."""
        return f"{self.name:<10} {'works' if self.works else 'no':<6} {self.version:<10} {self.why}"


def gather_facts(temporary: Path | None = None) -> Facts:
    """Look at this machine, and at the folder that builds take place in; takes some milliseconds."""
    folder = temporary or Path(tempfile.gettempdir())
    return Facts(
        problem=rights_problem(),
        ids=_subordinate_ids(Path("/etc/subuid")),
        fuse=os.access("/dev/fuse", os.R_OK | os.W_OK),
        temporary=folder,
        file_system=file_system_of(folder, Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")),
        free_bytes=shutil.disk_usage(folder).free,
    )


def rights_problem() -> tuple[str, str] | None:
    """Return why this user cannot build, and what helps: root without all its rights, or a user without a range of ids."""
    user = getpass.getuser()
    if os.geteuid() == 0:
        return None if _has_all_capabilities() else (ROOT_PROBLEM, ROOT_HINT)
    probe = run(["unshare", "--map-root-user", "--map-auto", "true"], check=False)
    if probe.returncode != 0:
        reason = f"user {user} cannot have a user namespace with a range of ids: {probe.stderr.strip()}"
        return reason, SUBUID_HINT.format(user=user)
    return None


def check_builder_rights() -> None:
    """Raise `ImageError` when this user cannot build."""
    problem = rights_problem()
    if problem is not None:
        raise ImageError(*problem)


def look_at(name: str, format: Format, facts: Facts) -> Finding:
    """Return whether the builder `name` works on this machine."""
    program = _program(name)
    if program is None:
        return Finding(name, format, "", "", False, "not installed")
    version = version_in(_version_answer(program))
    shown = ".".join(map(str, version)) or "unknown"
    if name == "docker":
        why = _docker_problem(program)
        return Finding(name, format, program, shown, why is None, why or "its engine answers, and has buildx")
    if version < OLDEST[name]:
        return Finding(name, format, program, shown, False, f"too old: {'.'.join(map(str, OLDEST[name]))} or newer is needed")
    obstacle = facts.obstacle()
    return Finding(name, format, program, shown, obstacle is None, obstacle or facts.describe())


def look_for_builders(format: Format, facts: Facts | None = None, *, on_archive: bool = False) -> tuple[Finding, ...]:
    """Return a finding for each builder of `format`, in the order in which they would be taken.

    Args:
        format: What is to be built.
        facts: What is known of this machine.
        on_archive: Whether the image stands on an OCI archive, which Docker does not read.
    """
    known = gather_facts() if facts is None else facts
    found = tuple(look_at(name, format, known) for name in NAMES[format])
    if not on_archive:
        return found
    without = {each.name: replace(each, works=False, why=ARCHIVE_PROBLEM) for each in found if each.name == "docker" and each.works}
    return tuple(without.get(each.name, each) for each in found)


def choose(findings: Sequence[Finding], wanted: str | None = None) -> Finding:
    """Return the first builder that works, or the one that is `wanted`.

    Raises:
        MissingPartError: None is installed.
        ImageError: None works; the message has every reason.
    """
    asked = [finding for finding in findings if wanted in (None, finding.name)]
    if not asked:
        known = ", ".join(finding.name for finding in findings)
        raise MissingPartError(f"{wanted!r} does not build this format", f"take one of {known}, or leave --builder out")
    working = next((finding for finding in asked if finding.works), None)
    if working is not None:
        return working
    installed = [finding for finding in asked if finding.program]
    lines = [f"  {finding.describe()}" for finding in asked]
    if not installed:
        raise MissingPartError("\n".join(["no builder is installed:", *lines]), _install_hint(asked))
    raise ImageError("\n".join(["no builder works here:", *lines]), _helping(installed))


def explain(chosen: Finding, findings: Sequence[Finding]) -> str:
    """Return why `chosen` builds, and why those before it do not."""
    others = [f"{finding.name}: {finding.why}" for finding in findings if finding != chosen]
    return f"built by {chosen.name} {chosen.version}: {chosen.why}" + (f" ({'; '.join(others)})" if others else "")


def version_in(text: str) -> tuple[int, ...]:
    """Return the first version number in a program's answer; nothing where there is none."""
    match = re.search(r"\d+(?:\.\d+)+", text)
    return () if match is None else tuple(int(part) for part in match.group().split("."))


def file_system_of(folder: Path, mounts: str) -> str:
    """Return the type of the file system that `folder` is on, from the text of /proc/mounts."""
    rows = [line.split()[1:3] for line in mounts.splitlines() if len(line.split()) > 2]
    points = [(point, kind) for point, kind in rows if folder == Path(point) or Path(point) in folder.parents]
    # The last of equal points hides the others.
    return max(enumerate(points), key=lambda row: (len(row[1][0]), row[0]))[1][1] if points else "unknown"


def _version_answer(program: str) -> str:
    """Ask a program for its version; buildah and podman would leave folders behind in the temporary one for that."""
    with tempfile.TemporaryDirectory(prefix="hpcutils-ask-") as folder:
        environment = {**os.environ, "TMPDIR": folder, "XDG_RUNTIME_DIR": folder}
        return run([program, "--version"], env=environment, check=False, timeout_s=ANSWER_S).stdout


def _program(name: str) -> str | None:
    own = str(find.OWN_BUILDER) if name == "apptainer" and find.OWN_BUILDER.is_file() else None
    return shutil.which(name) or own


def _docker_problem(program: str) -> str | None:
    engine = run([program, "info", "--format", "{{.ServerVersion}}"], check=False, timeout_s=ANSWER_S)
    if engine.returncode != 0:
        last = (engine.stderr or engine.stdout).strip().splitlines()[-1:]
        return f"a client without an engine: {' '.join(last) or 'no answer'}"
    buildx = run([program, "buildx", "version"], check=False, timeout_s=ANSWER_S)
    if buildx.returncode != 0:
        return "it has no buildx"
    driver = run([program, "buildx", "inspect"], check=False, timeout_s=ANSWER_S).stdout
    store = run([program, "info", "--format", "{{.DriverStatus}}"], check=False, timeout_s=ANSWER_S).stdout
    # With containerd's store of images the same driver can.
    return DRIVER_PROBLEM if re.search(r"^Driver:\s+docker$", driver, re.MULTILINE) and "containerd" not in store else None


def _subordinate_ids(table: Path) -> int:
    names = {getpass.getuser(), str(os.getuid())}
    try:
        rows = [line.split(":") for line in table.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return 0
    return sum(int(row[2]) for row in rows if len(row) == 3 and row[0] in names and row[2].isdigit())


def _has_all_capabilities() -> bool:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    held = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapPrm:")), 16)
    newest = int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))
    return held == (1 << newest + 1) - 1


def _install_hint(asked: Sequence[Finding]) -> str:
    if any(finding.name == "apptainer" for finding in asked):
        return "run containers/install-apptainer as root, or load the site's module"
    return "as root: apt-get install buildah"


def _helping(installed: Sequence[Finding]) -> str:
    problem = rights_problem()
    if problem is not None:
        return problem[1]
    return "; ".join(sorted({finding.why for finding in installed}))
