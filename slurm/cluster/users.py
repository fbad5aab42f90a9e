"""The ordinary user of the cluster: the account, its environment, and becoming it."""

from __future__ import annotations

import fnmatch
import os
import pwd
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import SandboxError
from .process import SYSTEM_ENVIRONMENT

USER = "hpcuser"
APPTAINER_BIN = "/opt/hpcutils/apptainer/usr/bin"
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
KEPT = ("TERM", "LANG", "CI", "HPCUTILS_*", "OMPI_MCA_*", "PMIX_MCA_*")
# On the machine itself, where images are built: what pip and apt need to find their way out.
KEPT_FOR_BUILDS = ("PIP_*", "*_PROXY", "*_proxy", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
SUBORDINATE_IDS = 65536


def account() -> pwd.struct_passwd:
    """The account, made when it is missing, with a home and a range of subordinate ids (for image builds)."""
    if _lookup() is None:
        _run(["useradd", "--create-home", "--shell", "/bin/bash", USER])
    for file, option in ((Path("/etc/subuid"), "--add-subuids"), (Path("/etc/subgid"), "--add-subgids")):
        ranges = _ranges(file)
        if USER not in [name for name, _, _ in ranges]:
            _run(["usermod", option, free_range(ranges), USER])
    entry = _lookup()
    if entry is None:
        raise SandboxError(f"the account {USER} was made and is not there", "/etc/passwd", f"try `getent passwd {USER}`")
    return entry


def _lookup() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        return None


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, env=SYSTEM_ENVIRONMENT)
    if done.returncode != 0 and _lookup() is None:  # another run of this script may have been quicker
        raise SandboxError(f"cannot make the account {USER}: {done.stderr.strip()}", " ".join(argv))


def _ranges(file: Path) -> list[tuple[str, int, int]]:
    lines = file.read_text().splitlines() if file.exists() else []
    return [(name, int(first), int(count)) for name, first, count in (line.split(":") for line in lines if line)]


def free_range(ranges: Iterable[tuple[str, int, int]]) -> str:
    """The first free range of subordinate ids above all that are taken, as usermod wants it."""
    first = max([100000, *(start + count for _, start, count in ranges)])
    return f"{first}-{first + SUBORDINATE_IDS - 1}"


def environment(checkout: Path, home: str, caller: Mapping[str, str], extra: Iterable[str] = ()) -> dict[str, str]:
    """A clean environment: who the user is, where programs are, and the few variables of the caller that may pass."""
    patterns = (*KEPT, *extra)
    kept = {name: value for name, value in caller.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
    path = f"{checkout}/.venv/bin:{APPTAINER_BIN}:{SYSTEM_PATH}"
    fixed = {"USER": USER, "LOGNAME": USER, "HOME": home, "SHELL": "/bin/bash", "PATH": path}
    return {"LANG": "C.UTF-8", **kept, **fixed}


def become(entry: pwd.struct_passwd) -> None:
    """Give up root for good."""
    os.initgroups(entry.pw_name, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    os.umask(0o022)


def open_fuse_device() -> None:
    """Let everybody use /dev/fuse, as Debian's udev rule does. Absent in some containers: then images cannot mount."""
    device = Path("/dev/fuse")
    if device.exists():
        device.chmod(0o666)
