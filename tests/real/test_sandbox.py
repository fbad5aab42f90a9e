"""The sandbox cluster, for real: it starts, repairs itself, and ends without a trace."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandboxes import (
    CHECKOUT,
    KINDS,
    Sandbox,
    listening_ports,
    members_of,
    namespaces_in_use,
    namespaces_of,
    require_slurm,
    sandbox,
    take_down_leftovers,
    wait_until,
)

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    """Two nodes of four GPUs that tests may use, and must leave healthy."""
    require_slurm()
    take_down_leftovers()
    with sandbox("--nodes", "2", "--gpus", "4") as shared:
        yield shared


@pytest.fixture(autouse=True)
def machine(box: Sandbox) -> None:
    """Every test here needs a machine that can have sandboxes."""


def test_a_second_up_does_nothing_and_another_shape_is_refused(box: Sandbox) -> None:
    before, began = box.status(), time.monotonic()
    assert "already up" in box.up("--nodes", "2", "--gpus", "4")
    took_s = time.monotonic() - began
    print(f"no-op up: {took_s:.2f} s")
    assert took_s < 1.0
    refused = box.call("up", "--nodes", "3")
    assert refused.returncode == 1
    assert "another shape" in refused.stderr and "where:" in refused.stderr and "down" in refused.stderr
    assert box.status() == before


def test_replace_takes_the_old_shape_down_first() -> None:
    with sandbox("--nodes", "2") as box:
        box.up("--nodes", "1", "--gpus", "1", "--partition", "only:MaxTime=5", "--replace")
        assert list(box.status()["nodes"]) == ["node1"]
        assert box.run("sinfo -h -o '%P %l %G'") == "only* 5:00 gpu:1"


def test_status_is_zero_only_for_a_healthy_sandbox() -> None:
    with sandbox("--nodes", "1") as box:
        assert box.call("status").returncode == 0
        status = box.status()
        assert status["healthy"] and status["nodes"] == {"node1": "idle"}
        os.kill(box.process("slurmd@node1"), signal.SIGKILL)
        wait_until(lambda: box.call("status").returncode == 1)
        assert box.status()["problems"] == ["slurmd@node1 is not running"]
        box.call("down")
        assert box.call("status").returncode == 1
        assert box.status()["problems"] == ["not up"]


def test_down_leaves_nothing_behind() -> None:
    mounts, links = Path("/proc/self/mountinfo").read_text(), sorted(os.listdir("/sys/class/net"))  # noqa: PTH208
    ports = listening_ports()
    with sandbox("--nodes", "3", "--gpus", "2") as box:
        assert not {6817, 6818} & (listening_ports() - ports)
        # What a job or a user may leave running: a batch job, and a daemon that nobody waits for.
        box.run("sbatch -o /dev/null --wrap 'sleep 1000' -N2; setsid sleep 1000 >/dev/null 2>&1 & sleep 0.5")
        hosts = box.status()["hosts"].values()
        namespaces = set().union(*map(namespaces_of, hosts))
        members = set().union(*map(members_of, hosts))
        assert len(namespaces) == len(KINDS) * 4 and len(members) >= 4 + 5 + 2
        assert not namespaces & namespaces_of(os.getpid())
        box.call("down", check=True)
        wait_until(lambda: not namespaces & namespaces_in_use(), 5)
        assert Path("/proc/self/mountinfo").read_text() == mounts
        assert sorted(os.listdir("/sys/class/net")) == links  # noqa: PTH208
        assert not box.root.exists()
        assert not [path for path in Path("/sys/fs/cgroup").glob("**/*slurm*") if path.is_dir()]
        again = box.call("down")
        assert again.returncode == 0 and "was not up" in again.stdout


@pytest.mark.parametrize("delay_s", [0.08, 0.2, 0.35])
@pytest.mark.parametrize("then", ["up", "down"])
def test_a_killed_up_is_taken_over(delay_s: float, then: str) -> None:
    with sandbox() as box:
        interrupted = subprocess.Popen(box.argv("up", "--nodes", "4"), stdout=subprocess.DEVNULL)
        time.sleep(delay_s)
        interrupted.kill()
        interrupted.wait()
        box.call(then, *(["--nodes", "4"] if then == "up" else []), check=True)
        assert box.status()["healthy"] == (then == "up")
        if then == "down":
            listing = subprocess.run(["ps", "-eo", "stat,args"], capture_output=True, text=True, check=True).stdout
            assert not [line for line in listing.splitlines() if box.name in line and not line.startswith("Z")]


@pytest.mark.parametrize("victim", ["munged@login", "slurmctld@login", "slurmd@node1", "node1", "login"])
def test_up_repairs_what_was_killed(victim: str) -> None:
    with sandbox("--nodes", "2", "--gpus", "1") as box:
        job = box.run("sbatch --parsable -o /dev/null -w node2 --wrap 'sleep 1000'")
        wait_until(lambda: box.run(f"squeue -h -j {job} -o %t") == "R")
        if victim in ("slurmctld@login", "login"):  # slurmctld writes the state of jobs down within 5 s
            since, saved = time.time(), box.root / "ctld/job_state"
            wait_until(lambda: saved.exists() and saved.stat().st_mtime > since)
        before = box.process(victim)
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: not box.status()["healthy"])
        box.up("--nodes", "2", "--gpus", "1")
        assert box.status()["healthy"] and box.process(victim) != before
        # node2 was never touched: its job must have lived through it all.
        assert box.run(f"squeue -h -j {job} -o %t") == "R"
        assert box.run("srun -N2 hostname | sort") == "node1\nnode2"


def test_two_sandboxes_side_by_side(box: Sandbox) -> None:
    with sandbox("--nodes", "1", "--gpus", "1") as other:
        assert box.run("sinfo -h -p main -o %D") == "2"
        assert other.run("sinfo -h -p main -o %D") == "1"
        ours, theirs = box.run("srun readlink /proc/self/ns/net"), other.run("srun readlink /proc/self/ns/net")
        assert ours != theirs
        other.call("down", check=True)
        assert box.status()["healthy"]


def test_sixteen_nodes_are_up_in_under_30_seconds() -> None:
    with sandbox() as box:
        began = time.monotonic()
        box.up("--nodes", "16", "--gpus", "4")
        took_s = time.monotonic() - began
        print(f"16 nodes up: {took_s:.1f} s")
        assert took_s < 30
        assert len(box.run("srun -N16 hostname | sort -u").split()) == 16


@contextlib.contextmanager
def hidden_checkout(parent: str) -> Iterator[Path]:
    """A copy of the scripts with a small environment, below a folder that only root may enter."""
    top = Path(tempfile.mkdtemp(prefix="sandbox-test-", dir=parent))  # mode 700
    checkout = top / "deeper" / "checkout"
    try:
        copy_checkout(checkout)
        yield checkout
    finally:
        shutil.rmtree(top)


def copy_checkout(checkout: Path) -> None:
    shutil.copytree(CHECKOUT / "slurm", checkout / "slurm", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", checkout / ".venv"], check=True)


@pytest.mark.parametrize("parent", ["/srv", "/tmp"])
def test_a_checkout_that_only_root_can_reach_is_shown_to_the_user(parent: str) -> None:
    see = "cat slurm/sandbox | head -1; python -c 'import sys; print(sys.prefix)'"
    with hidden_checkout(parent) as checkout, sandbox("--nodes", "1", checkout=checkout) as box:
        expected = f"#!/usr/bin/python3 -I\n{checkout}/.venv"
        assert box.run(see, "--cwd", str(checkout)) == expected
        assert box.run(see, "--cwd", str(checkout), "--node", "node1") == expected
        assert box.run(f'srun --chdir {checkout} bash -c "{see}"') == expected
        argv = [box.script, "user", "--cwd", checkout, "--", "bash", "-c", see]
        assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip() == expected
        refused = Sandbox(box.name).call("exec", "--", "true")
        assert refused.returncode == 1 and "another checkout" in refused.stderr
        # The next run of a CI clones to the same path while the last one's cluster is still up.
        shutil.rmtree(checkout)
        copy_checkout(checkout)
        box.up("--nodes", "1")
        assert box.run(see, "--cwd", str(checkout)) == expected
