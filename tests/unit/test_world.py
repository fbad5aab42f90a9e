"""Who am I among the ranks: every launcher's words, and what happens when they disagree."""

import pytest

from hpcutils.errors import WorldError
from hpcutils.world import check_against_mpi, world_from_environment

STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURMD_NODENAME": "node2",
    "PMIX_RANK": "5",
}


def test_alone():
    world = world_from_environment({})
    assert (world.rank, world.world_size, world.local_size, world.nodes) == (0, 1, 1, 1)


def test_under_srun():
    world = world_from_environment(STEP)
    assert (world.rank, world.world_size, world.local_rank, world.local_size) == (5, 8, 1, 4)
    assert (world.node_rank, world.nodes, world.node) == (1, 2, "node2")
    assert not world.is_leader


def test_nodes_with_different_numbers_of_tasks():
    assert world_from_environment(STEP | {"SLURM_STEP_TASKS_PER_NODE": "5,3"}).local_size == 3


def test_under_mpirun():
    said = {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    world = world_from_environment({f"OMPI_COMM_WORLD_{name}": value for name, value in said.items()} | {"PMIX_RANK": "1"})
    assert (world.rank, world.world_size, world.local_rank, world.local_size) == (1, 2, 1, 2)


def test_the_batch_shell_is_no_rank():
    # sbatch sets SLURM_PROCID=0 there as well: taking it at its word would make N silent worlds of one.
    with pytest.raises(WorldError, match="no rank"):
        world_from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"})


@pytest.mark.parametrize(
    "change",
    [{"PMIX_RANK": "0"}, {"OMPI_COMM_WORLD_SIZE": "1"}, {"SLURM_PROCID": "8", "PMIX_RANK": "8"}, {"SLURM_PROCID": "x"}],
)
def test_launchers_that_contradict_each_other(change):
    with pytest.raises(WorldError) as caught:
        world_from_environment(STEP | change)
    assert "--mpi=pmix" in (caught.value.hint or "")


def test_a_step_without_pmix():
    with pytest.raises(WorldError, match="rank 5 of 8 without PMIx"):
        world_from_environment({name: value for name, value in STEP.items() if name != "PMIX_RANK"})


def test_mpi_must_agree():
    world = world_from_environment(STEP)
    check_against_mpi(world, 5, 8)
    with pytest.raises(WorldError, match="rank 5 of 8, but MPI says rank 0 of 1"):
        check_against_mpi(world, 0, 1)
