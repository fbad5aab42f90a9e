"""For all tests: no test fails because the machine is busy; ranks of one world that run them together draw the same examples."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# Set where srun or mpirun start several ranks of the tests at once.
TOGETHER = bool(os.environ.get("HPCUTILS_TESTS_TOGETHER"))

# What runs in a shell's background, or under nohup, ignores these, and so would every command that a test starts. A handler that
# does nothing is not passed on to them.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

settings.register_profile("hpcutils", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("together", settings.get_profile("hpcutils"), derandomize=True, database=None, max_examples=20)
settings.load_profile("together" if TOGETHER else "hpcutils")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """End the whole world where a test fails on one rank: the others may wait for it in that very test."""
    if TOGETHER and report.failed:
        from mpi4py import MPI

        print(f"rank {MPI.COMM_WORLD.rank}: {report.nodeid}\n{report.longreprtext}", flush=True)
        MPI.COMM_WORLD.Abort(1)
