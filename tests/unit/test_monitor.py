"""What srun's own words say of a rank that died."""

from hpcutils.launch.monitor import rank_deaths


def test_the_cause_comes_first_whatever_srun_printed_first():
    log = "srun: error: node1: tasks 0-1: Terminated\nsrun: launch/slurm: ...\nsrun: error: node2: task 3: Killed\n"
    assert rank_deaths(log) == [
        "rank 3 on node2 was killed by signal 9 (SIGKILL)",
        "rank 0-1 on node1 was killed by signal 15 (SIGTERM)",
    ]


def test_exit_codes_and_core_dumps():
    log = "srun: error: node1: task 0: Exited with exit code 1\nsrun: error: node1: task 1: Segmentation fault (core dumped)\n"
    assert rank_deaths(log) == [
        "rank 0 on node1 ended: Exited with exit code 1",
        "rank 1 on node1 was killed by signal 11 (SIGSEGV)",
    ]


def test_a_quiet_log_names_nobody():
    assert rank_deaths("epoch 1/3\nsrun: Job step aborted\n") == []
