"""What a rank looks at before it starts: each finding a value, and this machine's own."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from hpcutils.errors import DeviceError, WorldError
from hpcutils.train.preflight import Facts, find_problem, free_shm_bytes, gather_facts, numbers
from hpcutils.world import World

GOOD = Facts("4.2.2", "4.2.2", 1 << 30, ("nvidia0",), "0")
WORLD = World(rank=1, world_size=4, local_rank=1, local_size=2, nodes=2, node="node1")


def test_a_good_node_has_no_problem() -> None:
    assert find_problem(GOOD, WORLD, wants_gpus=True) is None
    assert find_problem(dataclasses.replace(GOOD, gpu_devices=(), pmix_server=""), WORLD, wants_gpus=False) is None


@pytest.mark.parametrize(("server", "client"), [("2.0.3", "4.2.2"), ("4.2.2", "1.2.5"), ("2.1.0", "2.1.0")])
def test_versions_of_pmix_that_cannot_talk(server: str, client: str) -> None:
    problem = find_problem(dataclasses.replace(GOOD, pmix_server=server, pmix_client=client), WORLD, wants_gpus=True)
    assert isinstance(problem, WorldError)
    assert f"Slurm speaks PMIx {server}, the image {client}" in problem.message
    alone = World(world_size=1)
    assert find_problem(dataclasses.replace(GOOD, pmix_server=server, pmix_client=client), alone, wants_gpus=True) is None


@pytest.mark.parametrize(("server", "client"), [("2.1.1", "5.0.1"), ("5.0.1", "3.2.3"), ("4.2.2", ""), ("5.0.0rc1", "4.2.2")])
def test_versions_of_pmix_that_can(server: str, client: str) -> None:
    assert find_problem(dataclasses.replace(GOOD, pmix_server=server, pmix_client=client), WORLD, wants_gpus=True) is None


def test_too_little_shared_memory_is_told_with_the_cause() -> None:
    docker = dataclasses.replace(GOOD, shm_bytes=20 << 20)
    problem = find_problem(docker, WORLD, wants_gpus=True)
    assert isinstance(problem, WorldError)
    assert "/dev/shm: 20 MiB free; 2 ranks of a node need 32 MiB" in problem.message and "--ipc=host" in (problem.hint or "")
    assert find_problem(docker, dataclasses.replace(WORLD, local_size=1), wants_gpus=True) is None
    missing = find_problem(dataclasses.replace(GOOD, shm_bytes=None), WORLD, wants_gpus=True)
    assert missing is not None and "missing, or cannot be written" in missing.message


@pytest.mark.parametrize(("given", "said"), [("0,1", "Slurm gave it number 0,1"), ("", "Slurm gave it none")])
def test_gpus_that_are_not_seen(given: str, said: str) -> None:
    problem = find_problem(dataclasses.replace(GOOD, gpu_devices=(), gpus_given=given), WORLD, wants_gpus=True)
    assert isinstance(problem, DeviceError)
    assert said in problem.message and "--nv" in (problem.hint or "")


def test_the_facts_of_this_machine() -> None:
    facts = gather_facts({"PMIX_VERSION": "4.2.2", "SLURM_GPUS_ON_NODE": "2"})
    assert (facts.pmix_server, facts.gpus_given) == ("4.2.2", "2")
    assert facts.shm_bytes is None or facts.shm_bytes > 0


def test_looking_loads_no_pmix_in_place_of_mpis_own() -> None:
    code = "from hpcutils.train.preflight import gather_facts; print(gather_facts({'SLURM_STEP_ID': '0'}).pmix_client)\n"
    code += "print([line for line in open('/proc/self/maps') if 'libpmix' in line])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, mapped = done.stdout.splitlines()
    assert mapped == "[]"
    assert version == "" or numbers(version) > (1,)


def test_a_folder_that_is_not_there_has_no_room(tmp_path: Path) -> None:
    assert free_shm_bytes(tmp_path / "gone") is None
    assert (free_shm_bytes(tmp_path) or 0) > 0


def test_numbers_of_versions() -> None:
    assert numbers("4.2.2") == (4, 2, 2) and numbers("git1234") == (2, 1, 1)
