"""How much memory there is, and how much of it inflated chunks may take."""

import resource
import subprocess
import sys

import pytest

from hpcutils.data.chunks import cache_limit
from hpcutils.data.room import ranks_here, usable_bytes

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
