"""up, down and status. `up` looks at what is there and adds what is missing, so that it also repairs."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import pwd
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import config, daemons, hosts, network, users
from .errors import SandboxError
from .hosts import Host
from .process import SYSTEM_ENVIRONMENT, write_text

LOCK_TIMEOUT_S = 120.0
# What Slurm's PMIx plugin loads by this very name, and Debian ships with the headers.
PMIX_LIBRARY, PMIX_PACKAGE = "libpmix.so", "libpmix-dev"
PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "srun": "slurm-wlm",
    "munged": "munge",
    "mpirun": "openmpi-bin",
    "ip": "iproute2",
}


def check_machine() -> None:
    """Debian's packages, or an error that says which are missing."""
    path = SYSTEM_ENVIRONMENT["PATH"]
    missing = [program for program in PACKAGES if shutil.which(program, path=path) is None]
    if missing:
        packages = " ".join(sorted({PACKAGES[program] for program in missing}))
        raise SandboxError(f"programs are missing: {', '.join(missing)}", f"PATH={path}", f"apt-get install {packages}")
    try:
        ctypes.CDLL(PMIX_LIBRARY)
    except OSError as exc:
        raise SandboxError("Slurm cannot load PMIx: no MPI job would start", str(exc), f"apt-get install {PMIX_PACKAGE}") from exc


@contextlib.contextmanager
def locked(layout: config.Layout) -> Iterator[None]:
    """One `up` or `down` of a sandbox at a time. The lock is the folder itself: it leaves nothing behind.

    A `down` removes the folder while others wait for it: they find that they hold a folder which is no longer there.
    """
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while (fd := _try_lock(layout.root)) is None:
        if time.monotonic() > deadline:
            raise SandboxError("another up or down of this sandbox does not end", str(layout.root), "wait, or end it")
        time.sleep(0.1)
    try:
        yield
    finally:
        os.close(fd)


def _try_lock(folder: Path) -> int | None:
    """A handle that holds the lock on a folder, made when missing; None when it has to be tried again."""
    fd = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), folder.stat()):
            return fd
    except (BlockingIOError, FileNotFoundError):  # another one holds it, or removes it right now
        pass
    if fd is not None:
        os.close(fd)
    return None


def read_shape(layout: config.Layout) -> config.Shape | None:
    """The shape of the sandbox that is there, or None."""
    try:
        return config.Shape.from_json(json.loads(layout.shape_file.read_text()))
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


@dataclass(frozen=True)
class Status:
    """What is there: process ids as the machine counts them, None for what is not running."""

    name: str
    shape: config.Shape | None
    hosts: dict[str, int | None] = field(default_factory=dict)
    daemons: dict[str, int | None] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        if self.shape is None:
            return ["not up"]
        dead = [f"{name} is not running" for name, pid in {**self.hosts, **self.daemons}.items() if pid is None]
        states = {name: self.nodes.get(name, "unknown") for name in self.shape.node_names}
        return dead + [f"{name} is {state}" for name, state in states.items() if not daemons.is_up(state)]

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "healthy": not self.problems,
            "problems": self.problems,
            "shape": self.shape and self.shape.to_json(),
            "hosts": self.hosts,
            "daemons": self.daemons,
            "nodes": self.nodes,
            "scratch": config.SCRATCH,
        }


def status(layout: config.Layout) -> Status:
    shape = read_shape(layout)
    if shape is None:
        return Status(layout.name, None)
    return Status(
        name=layout.name,
        shape=shape,
        hosts={name: _pid(Host(layout, name)) for name in shape.host_names},
        daemons={f"{d.role}@{d.host.name}": _pid(d) for d in daemons.all_of(layout, shape)},
        nodes=daemons.node_states(layout),
    )


def _pid(owner: Host | daemons.Daemon) -> int | None:
    process = owner.process()
    return process.pid if process else None


def up(layout: config.Layout, shape: config.Shape, replace: bool = False) -> bool:
    """Make the sandbox be there and healthy.

    Returns:
        False when it already was.

    Raises:
        SandboxError: If one of another shape is there and `replace` is not set.
    """
    check_machine()
    users.open_fuse_device()
    user = users.account()
    with locked(layout):
        _settle_shape(layout, shape, replace)
        _end_strangers(layout, shape)
        if not status(layout).problems:
            return False
        if not any(Host(layout, name).process() for name in shape.host_names):
            _clear(layout)  # a fresh start: old controller state and old sockets of steps do not mix with new job ids
        _write_files(layout, shape)
        for name in shape.host_names:
            _ensure_host(Host(layout, name), shape, user)
        _ensure_network(layout, shape)
        _ensure_daemons(layout, shape)
        daemons.wait_for_nodes(layout, shape)
    return True


def _settle_shape(layout: config.Layout, shape: config.Shape, replace: bool) -> None:
    existing = read_shape(layout)
    if existing == shape and _files_current(layout, shape):
        return
    if replace or existing is None:  # None: the rest of an `up` that did not get far
        _end(layout)
        return
    what = f"a sandbox of another shape is there; asked for {shape.describe()}, of {shape.checkout}"
    if existing == shape:
        what = "this sandbox was made by another version of this script"
    where = f"sandbox {layout.name}: {existing.describe()}, of {existing.checkout}"
    raise SandboxError(what, where, "run `slurm/sandbox down` first, or add --replace, or give this one another --name")


def _rendered(layout: config.Layout, shape: config.Shape) -> dict[Path, str]:
    return {
        layout.hosts_file: config.render_hosts(shape),
        layout.etc / "slurm.conf": config.render_slurm_conf(shape, layout),
        layout.etc / "gres.conf": config.render_gres_conf(shape, layout),
        layout.etc / "cgroup.conf": config.render_cgroup_conf(),
    }


def _files_current(layout: config.Layout, shape: config.Shape) -> bool:
    return all(path.exists() and path.read_text() == text for path, text in _rendered(layout, shape).items())


def _end_strangers(layout: config.Layout, shape: config.Shape) -> None:
    """End hosts that still show a checkout which was deleted and made anew since."""
    for host in (Host(layout, name) for name in shape.host_names):
        process = host.process()
        if process and not hosts.sees(process, Path(shape.checkout)):
            process.kill()


def _write_files(layout: config.Layout, shape: config.Shape) -> None:
    for folder in (layout.etc, layout.gpus, layout.controller_state, layout.log, layout.records):
        folder.mkdir(parents=True, exist_ok=True)
    layout.disks.mkdir(mode=0o700, exist_ok=True)
    for gpu in range(shape.gpus):
        with contextlib.suppress(FileExistsError):
            (layout.gpus / f"gpu{gpu}").symlink_to(os.devnull)
    daemons.make_munge_folder(layout)
    for path, text in _rendered(layout, shape).items():
        write_text(path, text)
    write_text(layout.shape_file, json.dumps(shape.to_json()))


def _ensure_host(host: Host, shape: config.Shape, user: pwd.struct_passwd) -> None:
    if host.process() is None:
        # Its steps died with it. Their sockets would break a requeued job, which comes back under the same id.
        _remove(host.layout.spool(host.name))
        _remove(host.layout.disk(host.name))
        if host.name != config.LOGIN:
            host.layout.spool(host.name).mkdir()
        hosts.create(host, Path(shape.checkout), user)


def _ensure_network(layout: config.Layout, shape: config.Shape) -> None:
    login = Host(layout, config.LOGIN).up()
    if not network.has_bridge(login):
        network.make_bridge(login)
    for name in shape.node_names:
        node = Host(layout, name).up()
        if not network.has_cable(login, node, name):
            network.make_cable(login, node, name)


def _ensure_daemons(layout: config.Layout, shape: config.Shape) -> None:
    for daemon in daemons.all_of(layout, shape):
        if daemon.process() is None:
            daemons.launch(daemon)
        if daemon.role == "munged":
            daemons.wait_for_munge(daemon)


def down(layout: config.Layout) -> bool:
    """End the sandbox and remove its files.

    Returns:
        False when there was none.
    """
    if not layout.root.exists():
        return False
    with locked(layout):
        _end(layout)
        layout.root.rmdir()
    with contextlib.suppress(OSError):  # other sandboxes are in it
        config.ROOT.rmdir()
    return True


def _end(layout: config.Layout) -> None:
    """End every recorded host; the kernel ends all that runs in one with it. Then remove the files."""
    for record in sorted(layout.records.glob("*.host.json")):
        process = hosts.read_record(record)
        if process:
            process.kill()
    _clear(layout)


def _clear(layout: config.Layout) -> None:
    for path in layout.root.iterdir():
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
