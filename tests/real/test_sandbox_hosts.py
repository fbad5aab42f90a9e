"""What commands and jobs see on the hosts of a sandbox cluster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import require
from sandboxes import (
    CHECKOUT,
    Sandbox,
    require_slurm,
    sandbox,
    state,
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


@pytest.fixture
def folder(box: Sandbox) -> Iterator[Path]:
    """A folder of the ordinary user, seen by all hosts and by this test."""
    path = Path(box.run("mktemp -d ~/sandbox-test.XXXXXX"))
    yield path
    shutil.rmtree(path)


def test_exec_is_the_ordinary_user_in_a_clean_environment(box: Sandbox) -> None:
    caller = {**os.environ, "HPCUTILS_X": "1", "OMPI_MCA_x": "2", "SECRET": "3", "PIP_X": "4", "PYTHONPATH": "/5"}
    text = box.call("exec", "--", "env", env=caller).stdout
    variables = dict(line.split("=", 1) for line in text.splitlines())
    assert variables["USER"] == "hpcuser" and variables["HOME"] == "/home/hpcuser"
    assert variables["PATH"].startswith(f"{CHECKOUT}/.venv/bin:/opt/hpcutils/apptainer/usr/bin:")
    assert Path(variables["SLURM_CONF"]).name == "slurm.conf"
    assert variables["HPCUTILS_X"] == "1" and variables["OMPI_MCA_x"] == "2"
    assert not {"SECRET", "PIP_X", "PYTHONPATH"} & variables.keys()
    assert box.run("id -un; hostname; pwd") == "hpcuser\nlogin\n/home/hpcuser"
    assert box.run("hostname; pwd", "--node", "node2", "--cwd", str(CHECKOUT)) == f"node2\n{CHECKOUT}"
    assert box.run("id -u", "--root") == "0"


def test_user_is_the_same_user_on_the_machine_itself(box: Sandbox) -> None:
    caller = {**os.environ, "PIP_X": "4", "https_proxy": "p", "SECRET": "3"}
    done = subprocess.run(
        [box.script, "user", "--", "bash", "-c", "id -un; echo $PIP_X$https_proxy$SECRET; readlink /proc/self/ns/net"],
        capture_output=True,
        text=True,
        env=caller,
        check=True,
    )
    assert done.stdout.split() == ["hpcuser", "4p", str(Path("/proc/self/ns/net").readlink())]


def test_exec_passes_input_output_and_exit_codes(box: Sandbox) -> None:
    assert box.call("exec", "--", "cat", input="hello").stdout == "hello"
    assert box.call("exec", "--", "sh", "-c", "exit 75").returncode == 75
    assert box.call("exec", "--", "sh", "-c", "kill -TERM $$").returncode == -signal.SIGTERM
    missing = box.call("exec", "--", "no-such-program")
    assert missing.returncode == 127 and "no-such-program" in missing.stderr
    # A pipeline's writer dies of SIGPIPE, as it would without us.
    first = subprocess.run(f"{' '.join(box.argv('exec', '--', 'yes'))} | head -1", shell=True, capture_output=True)  # noqa: S602
    assert first.stdout == b"y\n" and first.stderr == b""


def test_exec_passes_signals_once(box: Sandbox) -> None:
    count = "n=0; trap 'n=$((n+1))' USR2; trap 'echo $n; exit 3' TERM; echo ready; while :; do sleep 0.02; done"
    with subprocess.Popen(box.argv("exec", "--", "bash", "-c", count), stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout.readline() == "ready\n"
        command.send_signal(signal.SIGUSR2)
        time.sleep(0.3)
        command.send_signal(signal.SIGTERM)
        assert command.stdout.read() == "1\n"
    assert command.returncode == 3


def test_exec_stops_and_goes_on(box: Sandbox) -> None:
    # A process group of its own: the kernel ignores SIGTSTP for a group without a parent in its session, and the test's may be one.
    with subprocess.Popen(box.argv("exec", "--", "sleep", "1000"), process_group=0) as command:
        try:
            children = Path(f"/proc/{command.pid}/task/{command.pid}/children")
            wait_until(children.read_text)
            child = int(children.read_text())
            wait_until(lambda: Path(f"/proc/{child}/comm").read_text() == "sleep\n")
            command.send_signal(signal.SIGTSTP)
            wait_until(lambda: state(command.pid) == state(child) == "T")
            command.send_signal(signal.SIGCONT)
            wait_until(lambda: state(command.pid) == state(child) == "S")
        finally:
            command.kill()
        wait_until(lambda: not Path(f"/proc/{child}").exists())


def test_exec_passes_the_terminal(box: Sandbox) -> None:
    line = " ".join([*box.argv("exec"), "--", "'test -t 0 -a -t 1; echo $?; tty'"]).replace("-- '", "-- bash -c '")
    said = subprocess.run(["script", "-qec", line, "/dev/null"], capture_output=True, text=True, check=True)
    assert said.stdout.split()[0] == "0" and "/dev/pts/" in said.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["exec", "--name", "never-up", "--", "true"], "not up"),
        (["exec"], "command is missing"),
        (["up", "--name", "Not/A/Name"], "not a sandbox name"),
    ],
)
def test_wrong_use_says_what_where_and_what_to_do(arguments: list[str], complaint: str) -> None:
    done = subprocess.run([CHECKOUT / "slurm/sandbox", *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert complaint in done.stderr and "where:" in done.stderr and "hint:" in done.stderr


def test_without_root_it_says_so(box: Sandbox) -> None:
    done = subprocess.run([box.script, "user", "--", box.script, "status"], capture_output=True, text=True)
    assert done.returncode == 1 and "needs root" in done.stderr


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CHECKOUT / "slurm"))
    from cluster import errors, lifecycle

    monkeypatch.setattr(lifecycle.shutil, "which", lambda program, path: None if program in ("ip", "slurmd") else "/x")
    with pytest.raises(errors.SandboxError) as caught:
        lifecycle.check_machine()
    assert caught.value.hint == "apt-get install iproute2 slurm-wlm"


def test_a_slurm_that_could_start_no_mpi_job_is_told_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CHECKOUT / "slurm"))
    from cluster import errors, lifecycle

    lifecycle.check_machine()
    monkeypatch.setattr(lifecycle, "PMIX_LIBRARY", "libpmix-that-is-not-there.so")
    with pytest.raises(errors.SandboxError, match="PMIx") as caught:
        lifecycle.check_machine()
    assert caught.value.hint == "apt-get install libpmix-dev"


def test_each_host_has_its_own_local_folders_and_shares_home(box: Sandbox, folder: Path) -> None:
    places = ["/tmp", "/tmp/scratch", "/var/tmp", "/dev/shm"]
    box.run("for d in " + " ".join(places) + "; do touch $d/mine; done; touch " + f"{folder}/ours", "--node", "node1")
    for place in places:
        assert "mine" in box.run(f"ls {place}", "--node", "node1").split()
        assert "mine" not in box.run(f"ls {place}", "--node", "node2").split()
        assert "mine" not in box.run(f"ls {place}").split()
    assert box.run(f"ls {folder}", "--node", "node2") == "ours"
    assert (folder / "ours").exists()
    assert box.run("srun -N2 hostname | sort") == "node1\nnode2"


def test_a_gpu_belongs_to_one_job_at_a_time(box: Sandbox, folder: Path) -> None:
    """Three jobs of two GPUs on a node of four: two run at once on different GPUs, the third has to wait."""
    script = f"echo $CUDA_VISIBLE_DEVICES > {folder}/$SLURM_JOB_ID; while [ ! -e {folder}/end ]; do sleep 0.1; done"
    jobs = [box.run(f"sbatch --parsable -w node1 -o /dev/null --gres=gpu:2 --wrap '{script}'") for _ in range(3)]
    wait_until(lambda: all((folder / job).exists() and (folder / job).read_text() for job in jobs[:2]))
    taken = [(folder / job).read_text().strip().split(",") for job in jobs[:2]]
    assert sorted(taken[0] + taken[1]) == ["0", "1", "2", "3"]
    wait_until(lambda: box.run(f"squeue -h -j {jobs[2]} -o '%t %r'") in ("PD Resources", "PD Priority"))
    assert not (folder / jobs[2]).exists()
    (folder / "end").touch()
    wait_until(lambda: (folder / jobs[2]).exists())
    wait_until(lambda: not box.run("squeue -h"))


def test_mpi_over_two_nodes_as_the_ordinary_user(box: Sandbox) -> None:
    require(find_spec("mpi4py") is not None, "mpi4py (make setup)")
    program = "from mpi4py import MPI; c = MPI.COMM_WORLD; print(c.size, c.allreduce(c.rank), MPI.Get_processor_name())"
    said = box.run(f'srun -N2 --ntasks-per-node=2 python -c "{program}"')  # pmix is the default
    assert sorted(said.splitlines()) == ["4 6 node1", "4 6 node1", "4 6 node2", "4 6 node2"]


def test_nodes_claim_more_than_the_machine_has(box: Sandbox) -> None:
    assert box.run("sinfo -h -p main -o '%c %m %G'") == "8 65536 gpu:4"
    assert box.run("srun -n8 -N1 --mem=32G hostname | sort -u").startswith("node")
