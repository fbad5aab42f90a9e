"""What a sandbox looks like, where it keeps its files, and the text of its configuration. Pure: no effects."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path("/var/lib/hpcutils-sandbox")
DEFAULT_NAME = "default"
DEFAULT_PARTITIONS = ("main", "debug:MaxTime=60")
LOGIN = "login"
SUBNET = "10.77.0.0/16"
LOGIN_ADDRESS = "10.77.0.1"
PREFIX_LENGTH = 16
SCRATCH = "/tmp/scratch"
MAX_NODES = 200
MAX_GPUS = 64
# The longest socket name slurmstepd makes below <root>/<name>/<node>/ must fit the 107 bytes of a Unix socket path.
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,23}")
PARTITION_PATTERN = re.compile(r"[A-Za-z][\w-]*(:\w+=[\w.,-]+)*")
NODE_MEMORY_MB = 65536
NODE_DISK_MB = 65536


@dataclass(frozen=True)
class Shape:
    """What `up` was asked for. Two ups with equal shapes are the same cluster."""

    nodes: int
    gpus: int
    partitions: tuple[str, ...]
    checkout: str

    @property
    def node_names(self) -> list[str]:
        return [f"node{k}" for k in range(1, self.nodes + 1)]

    @property
    def host_names(self) -> list[str]:
        return [LOGIN, *self.node_names]

    @property
    def cpus(self) -> int:
        """CPUs a node claims: two a GPU, and never fewer than eight."""
        return 2 * max(self.gpus, 4)

    def describe(self) -> str:
        names = ", ".join(p.partition(":")[0] for p in self.partitions)
        return f"{self.nodes} node(s) x {self.gpus} GPU(s), partitions {names}"

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "partitions": list(self.partitions)}

    @staticmethod
    def from_json(values: dict) -> Shape:
        return Shape(**{**values, "partitions": tuple(values["partitions"])})


@dataclass(frozen=True)
class Layout:
    """Every path a sandbox owns, all below one folder."""

    name: str

    @property
    def root(self) -> Path:
        return ROOT / self.name

    @property
    def shape_file(self) -> Path:
        return self.root / "shape.json"

    @property
    def etc(self) -> Path:
        """Seen as /etc/slurm by every host."""
        return self.root / "etc"

    @property
    def hosts_file(self) -> Path:
        """Seen as /etc/hosts by every host."""
        return self.root / "hosts"

    @property
    def munge(self) -> Path:
        return self.root / "munge"

    @property
    def gpus(self) -> Path:
        return self.root / "gpus"

    @property
    def controller_state(self) -> Path:
        return self.root / "ctld"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def records(self) -> Path:
        """One file a process that was started: its id, start time and boot."""
        return self.root / "run"

    @property
    def disks(self) -> Path:
        """The node-local disks, mode 700: a node must not reach another one's by path."""
        return self.root / "disks"

    def spool(self, node: str) -> Path:
        return self.root / node

    def disk(self, host: str) -> Path:
        return self.disks / host

    def record(self, host: str, role: str) -> Path:
        return self.records / f"{host}.{role}.json"


def address(host: str) -> str:
    """The address of a host inside the sandbox: the login host's, or 10.77.1.K for nodeK."""
    return LOGIN_ADDRESS if host == LOGIN else f"10.77.1.{int(host.removeprefix('node'))}"


def render_hosts(shape: Shape) -> str:
    """The /etc/hosts of every host."""
    known = "".join(f"{address(host)} {host}\n" for host in shape.host_names)
    return f"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n{known}"


def render_gres_conf(shape: Shape, layout: Layout) -> str:
    """gres.conf: links to /dev/null stand in for GPUs. The allocation is real, the devices are not.

    They must lead to a device: for plain files slurmd allocates as well, but sets no CUDA_VISIBLE_DEVICES.
    """
    if not shape.gpus:
        return ""
    files = f"File={layout.gpus}/gpu[0-{shape.gpus - 1}] Flags=nvidia_gpu_env"
    return f"AutoDetect=off\nNodeName=node[1-{shape.nodes}] Name=gpu {files}\n"


def render_cgroup_conf() -> str:
    """cgroup.conf: nothing here uses cgroups, yet slurmd loads a plugin for them and dies when that one does.

    The one for version 1 touches nothing until something is asked of it. The one for version 2, slurmd's own choice on
    a current machine, would have systemd start a scope for a process id that means another process out there.
    """
    return "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"


def render_slurm_conf(shape: Shape, layout: Layout) -> str:
    """slurm.conf, sections in the order of its manual page's topics."""
    return "\n".join([_controller(layout), _scheduling(), _timing(), _nodes(shape), _partitions(shape), ""])


def _controller(layout: Layout) -> str:
    # linuxproc, task/none and jobacct/none: nothing here may depend on the machine's cgroups.
    # PropagateResourceLimits: a root without CAP_SYS_RESOURCE cannot raise a limit, and slurmstepd would complain.
    return f"""\
ClusterName=sandbox
SlurmctldHost={LOGIN}({LOGIN_ADDRESS})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={layout.munge}/socket
StateSaveLocation={layout.controller_state}
SlurmdSpoolDir={layout.root}/%n
SlurmctldPidFile={layout.records}/slurmctld.pid
SlurmdPidFile={layout.records}/%n.pid
SlurmctldLogFile={layout.log}/slurmctld.log
SlurmdLogFile={layout.log}/slurmd.%n.log
MpiDefault=pmix
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
SwitchType=switch/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
"""


def _scheduling() -> str:
    # Cores are what runs out; memory is claimed generously and not counted. The short intervals make a queued job
    # start within seconds of the one before it ending.
    return """\
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0
PriorityType=priority/basic
"""


def _timing() -> str:
    # SlurmdTimeout: short enough for a test to see a node die, long enough for a slurmd starved by a build to answer.
    return """\
ReturnToService=2
SlurmdTimeout=45
SlurmctldTimeout=30
MessageTimeout=20
KillWait=5
InactiveLimit=0
UnkillableStepTimeout=120
JobRequeue=1
"""


def _nodes(shape: Shape) -> str:
    gres = f" Gres=gpu:{shape.gpus}" if shape.gpus else ""
    cores = f"CPUs={shape.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={shape.cpus} ThreadsPerCore=1"
    claim = f"{cores} RealMemory={NODE_MEMORY_MB} TmpDisk={NODE_DISK_MB}{gres}"
    nodes = [f"NodeName={name} NodeAddr={address(name)} {claim} State=UNKNOWN" for name in shape.node_names]
    return "\n".join((["GresTypes=gpu"] if shape.gpus else []) + nodes) + "\n"


def _partitions(shape: Shape) -> str:
    lines = []
    for position, partition in enumerate(shape.partitions):
        name, *options = partition.split(":")
        default = ["Default=YES"] if position == 0 else []
        lines.append(" ".join([f"PartitionName={name}", f"Nodes=node[1-{shape.nodes}]", *default, *options]))
    return "\n".join(lines)
