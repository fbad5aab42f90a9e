"""What an image can say of itself. Runs inside of it (`python3 - COMMAND < this file`) and needs nothing but Python.

tree     one JSON list a line: path, kind, mode, size in bytes, whole seconds of its date, sha256 or link
sizes    one JSON object: bytes of each package by kind, and of all files
"""

# A hundred thousand paths: plain text is several times faster than Path objects.
# ruff: noqa: PTH115, PTH118, PTH120
from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator

# The machine's, or made when a container starts.
NOT_OURS = {"/proc", "/sys", "/dev", "/tmp", "/var/tmp", "/run", "/home", "/root", "/mnt", "/.singularity.d"}
MADE_AT_START = {"/etc/hosts", "/etc/resolv.conf", "/etc/passwd", "/etc/group", "/etc/localtime", "/etc/hostname"}
# Their folders' dates are those of the start.
CHANGED_AT_START = {os.path.dirname(path) for path in MADE_AT_START}


def files() -> Iterator[tuple[str, os.stat_result]]:
    """Yield every path of the image with its status, in order."""
    for folder, names, others in os.walk("/"):
        names[:] = sorted(name for name in names if os.path.join(folder, name) not in NOT_OURS)
        for name in sorted(names + others):
            path = os.path.join(folder, name)
            if path not in MADE_AT_START:
                yield path, os.lstat(path)


def content_of(path: str, status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(path)
    if not stat.S_ISREG(status.st_mode):
        return ""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except PermissionError:
        return "not readable"


def tree() -> None:
    for path, status in files():
        kind, mode = stat.filemode(status.st_mode)[0], oct(stat.S_IMODE(status.st_mode))
        size = status.st_size if kind == "-" else 0
        date = 0 if path in CHANGED_AT_START else int(status.st_mtime)
        print(json.dumps([path, kind, mode, size, date, content_of(path, status)]))


def python_sizes() -> dict[str, int]:
    sizes = {}
    for package in importlib.metadata.distributions():
        listed = {str(package.locate_file(file)) for file in package.files or ()}
        # Compiled after it was installed: its record does not know of these.
        compiled = {importlib.util.cache_from_source(path) for path in listed if path.endswith(".py")}
        sizes[package.metadata["Name"]] = sum(size_of(path) for path in listed | compiled)
    return sizes


def debian_sizes() -> dict[str, int]:
    """Of the files that are there: what a package's own record says counts manuals, too, which were left out."""
    sizes = {}
    query = ["dpkg-query", "--show", "--showformat", "${Package}\n"]
    names = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    for name in names:
        listed = subprocess.run(["dpkg-query", "--listfiles", name], capture_output=True, text=True, check=False).stdout
        sizes[name] = sum(size_of(path) for path in listed.splitlines())
    return sizes


def size_of(path: str) -> int:
    try:
        status = os.lstat(path)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def sizes() -> None:
    # A file with several names counts once.
    seen = {(status.st_dev, status.st_ino): status.st_size for _, status in files() if stat.S_ISREG(status.st_mode)}
    print(json.dumps({"python": python_sizes(), "debian": debian_sizes(), "all_files": sum(seen.values())}))


if __name__ == "__main__":
    {"tree": tree, "sizes": sizes}[sys.argv[1]]()
