"""How much memory there is, and how much of it inflated chunks may take."""

import resource
import subprocess
import sys
import types

import pytest

from hpcutils.data import shared
from hpcutils.data.chunks import cache_limit
from hpcutils.data.room import ranks_here, usable_bytes
from hpcutils.data.shared import free_memory_bytes

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path):
    """A machine with 4096 MiB free, and a process in a group of 3072 MiB below one of 2048 MiB."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable:  {4096 << 10} kB\n")
    (proc / "self" / "cgroup").write_text("1:name=systemd:/old\n0::/slurm/job_1\n")
    (cgroups / "slurm" / "job_1").mkdir(parents=True)
    (cgroups / "slurm" / "job_1" / "memory.max").write_text(f"{3072 * MIB}\n")
    (cgroups / "slurm" / "memory.max").write_text(f"{2048 * MIB}\n")
    return proc, cgroups


def test_the_smallest_limit_counts(machine):
    proc, cgroups = machine
    assert usable_bytes(proc, cgroups) == 2048 * MIB
    (cgroups / "slurm" / "memory.max").write_text("max\n")
    assert usable_bytes(proc, cgroups) == 3072 * MIB
    (proc / "self" / "cgroup").unlink()
    assert usable_bytes(proc, cgroups) == 4096 * MIB
    (proc / "meminfo").unlink()
    assert usable_bytes(proc, cgroups) is None


def test_limits_of_version_1_count_too(machine):
    """Slurm on an older system: the memory controller has a tree of its own, and no limit is a very large number."""
    proc, cgroups = machine
    (proc / "self" / "cgroup").write_text("11:cpu,cpuacct:/slurm\n9:memory:/slurm/job_2/step_0\n1:name=systemd:/old\n")
    step = cgroups / "memory" / "slurm" / "job_2" / "step_0"
    step.mkdir(parents=True)
    (step / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert usable_bytes(proc, cgroups) == 4096 * MIB
    (step.parent / "memory.limit_in_bytes").write_text(f"{1024 * MIB}\n")
    assert usable_bytes(proc, cgroups) == 1024 * MIB
    (step / "memory.limit_in_bytes").write_text(f"{512 * MIB}\n")
    assert usable_bytes(proc, cgroups) == 512 * MIB


@pytest.mark.parametrize(("group", "file"), [("0::/job", "job/memory.max"), ("4:memory:/job", "memory/job/memory.limit_in_bytes")])
def test_windows_take_no_more_than_the_group_or_the_shared_memory_has(machine, monkeypatch, group, file):
    proc, cgroups = machine
    (proc / "self" / "cgroup").write_text(f"{group}\n")
    (cgroups / file).parent.mkdir(parents=True)
    (cgroups / file).write_text(f"{1024 * MIB}\n")
    monkeypatch.setattr(shared, "usable_bytes", lambda: usable_bytes(proc, cgroups))
    room = {"free": 8192 * MIB}

    def statvfs(path):
        assert path == "/dev/shm"
        return types.SimpleNamespace(f_bavail=room["free"] // 4096, f_frsize=4096)

    monkeypatch.setattr(shared.os, "statvfs", statvfs)
    assert free_memory_bytes() == 1024 * MIB
    room["free"] = 64 * MIB
    assert free_memory_bytes() == 64 * MIB, "a container's own /dev/shm"


def test_a_limit_of_the_process_itself():
    code = f"""
        import resource
        from hpcutils.data.room import usable_bytes
        free = usable_bytes()
        resource.setrlimit(resource.RLIMIT_AS, ({2048 * MIB}, {2048 * MIB}))
        print(free, usable_bytes())
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    free, limited = map(int, done.stdout.split())
    assert 0 < limited < min(free + 1, 2048 * MIB)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != 2048 * MIB


def test_the_share_for_chunks():
    assert cache_limit(None, 1) == 128 * MIB
    assert cache_limit(1024 * MIB, 1) == 128 * MIB
    assert cache_limit(16 * 1024 * MIB, 1) == 512 * MIB
    assert cache_limit(16 * 1024 * MIB, 2) == 256 * MIB
    assert cache_limit(512 * 1024 * MIB, 4) == 1024 * MIB


def test_ranks_that_share_the_machine(monkeypatch):
    for name in ("SLURM_STEP_ID", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_here() == 1
    for name, value in {"RANK": "1", "SIZE": "4", "LOCAL_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert ranks_here() == 4
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "many")
    assert ranks_here() == 1
