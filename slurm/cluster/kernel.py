"""The system calls that Python 3.11 does not offer, and nothing else."""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
HOST_NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET

MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, call: str) -> None:
    if result != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{os.strerror(errno)} ({call})")


def unshare(flags: int) -> None:
    """Leave the given namespaces for new ones. A new process namespace holds only children forked from here on."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, flags: int) -> None:
    """Join namespaces of the process that the pidfd `fd` names (Linux 5.8)."""
    _checked(_libc.setns(ctypes.c_int(fd), ctypes.c_int(flags)), "setns")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2). `kind` is the file system type, empty for a bind or a change of propagation."""
    result = _libc.mount(source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), options.encode() or None)
    _checked(result, f"mount {source} on {target}")


def bind(source: str, target: str) -> None:
    """Show `source`, with what is mounted below it, at `target`, which must exist."""
    mount(source, target, flags=MS_BIND | MS_REC)


def die_with_parent(signum: int) -> None:
    """Have the kernel send `signum` to this process when its parent dies. Lost on a change of user: call after it."""
    _checked(_libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signum), 0, 0, 0), "prctl")
