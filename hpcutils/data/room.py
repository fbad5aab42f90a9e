"""How much memory this process may still take: what is free, what its control group allows, what its own limits allow."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from hpcutils.errors import WorldError
from hpcutils.world import world_from_environment

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def usable_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Return the smallest of all limits that can be read, in bytes, or `None` where none can (no Linux)."""
    return min((*_available(proc), *_group_limits(proc, cgroups), *_own_limits(proc)), default=None)


def ranks_here() -> int:
    """Return how many ranks share this machine's memory, as far as the launcher said; 1 without a word from it."""
    try:
        return world_from_environment().local_size
    except WorldError:  # not the place to complain: the entry point does
        return 1


def _field(path: Path, name: str) -> Iterator[int]:
    """Yield the figure of a line like `MemAvailable:  123 kB`, in bytes."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            yield int(line.split()[1]) << 10


def _available(proc: Path) -> Iterator[int]:
    yield from _field(proc / "meminfo", "MemAvailable")


def _own_limits(proc: Path) -> Iterator[int]:
    for which, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit, _ = resource.getrlimit(which)
        if limit != resource.RLIM_INFINITY:
            used = next(_field(proc / "self" / "status", field), 0)
            yield max(0, limit - used)


def _group_limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """Yield the memory limits of this process' control group and of all above it, of version 2 and of version 1."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        # number:controllers:path, "0::/path" in version 2
        number, controllers, group = line.split(":", 2)
        if number == "0" and not controllers:
            yield from _limits_above(cgroups, group, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits_above(cgroups / "memory", group, "memory.limit_in_bytes")


def _limits_above(root: Path, group: str, name: str) -> Iterator[int]:
    folder = root / group.lstrip("/")
    while folder.is_relative_to(root):
        try:
            text = (folder / name).read_text(encoding="ascii").strip()
        except OSError:
            text = "max"
        # No limit is "max" in version 2, and in version 1 a number larger than any machine's memory.
        if text.isdigit():
            yield int(text)
        folder = folder.parent
