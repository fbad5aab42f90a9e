"""The wires: a bridge on the login host, and one cable (a veth pair) from it to each node.

All of it lives in the hosts' own network namespaces; the machine's never sees an interface or a listening port.
"""

from __future__ import annotations

from pathlib import Path

from . import config, kernel
from .errors import SandboxError
from .hosts import run_inside
from .process import Process

BRIDGE = "br0"


def interfaces(process: Process) -> set[str]:
    lines = Path(f"/proc/{process.pid}/net/dev").read_text().splitlines()[2:]
    return {line.partition(":")[0].strip() for line in lines}


def _routed(process: Process, interface: str) -> bool:
    """Whether an interface has its address: the kernel adds the subnet's route with it, our last step."""
    routes = Path(f"/proc/{process.pid}/net/route").read_text().splitlines()[1:]
    return any(line.split()[0] == interface for line in routes)


def has_bridge(login: Process) -> bool:
    return _routed(login, BRIDGE)


def has_cable(login: Process, node: Process, name: str) -> bool:
    return name in interfaces(login) and _routed(node, "eth0")


def make_bridge(login: Process) -> None:
    """The switch, from whatever an interrupted attempt left."""
    _unplug(login, BRIDGE)
    _ip(login, [f"link add {BRIDGE} type bridge", "link set lo up", *_address(BRIDGE, config.LOGIN)])


def make_cable(login: Process, node: Process, name: str) -> None:
    """Plug one node in, in place of a half-made cable or one whose other end is just going away with its host."""
    _unplug(node, "eth0")
    _unplug(login, name)
    plug = f"link add {name} type veth peer name eth0 netns {node.pid}"
    _ip(login, [plug, f"link set {name} master {BRIDGE} up"])
    _ip(node, ["link set lo up", *_address("eth0", name)])


def _unplug(process: Process, interface: str) -> None:
    """Remove an interface if it is there. It may vanish by itself in between: then `ip` fails, and all is well."""
    if interface in interfaces(process):
        run_inside(process, ["ip", "link", "del", interface], kernel.CLONE_NEWNET)


def _address(interface: str, host: str) -> list[str]:
    return [f"link set {interface} up", f"addr add {config.address(host)}/{config.PREFIX_LENGTH} dev {interface}"]


def _ip(process: Process, lines: list[str]) -> None:
    done = run_inside(process, ["ip", "-batch", "-"], kernel.CLONE_NEWNET, "\n".join(lines) + "\n")
    if done.returncode != 0:
        raise SandboxError(
            f"cannot set up the network: {done.stderr.strip()}",
            "; ".join(lines),
            "the kernel needs the modules `veth` and `bridge`",
        )
