"""Lines of the batch script before srun, run by bash: folders that are known only in the job, and how they fail."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from hpcutils.errors import RequestError
from hpcutils.launch.monitor import status
from hpcutils.launch.node_lines import site_folders
from hpcutils.launch.request import plan_request
from hpcutils.rundir import RunDirectory
from hpcutils.specs.job import load_job
from hpcutils.specs.site import Site

ROOT = Path(__file__).parents[2]


def site(**folders: str) -> Site:
    return Site.model_validate({"name": "somewhere", "folders": folders})


def run_script(tmp_path: Path, site: Site, after: str, image: Path | None = Path("/i.sif"), **environ: str):
    """Run the lines of a job's batch script before its srun, with a `srun` that makes folders here."""
    run = RunDirectory(tmp_path / "runs/a")
    run.path.mkdir(parents=True, exist_ok=True)
    planned = plan_request(load_job(ROOT / "jobs/digits/train.yaml"), run, image, Path("/jobs"), site)
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin/srun").write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
    (tmp_path / "bin/srun").chmod(0o755)
    script = "\n".join([*planned.parameters["setup"], after])
    variables = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_NUM_NODES": "1", **environ}
    return planned, subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, check=False)


def test_what_is_known_now_is_filled_in_now() -> None:
    found = site_folders(site(scratch="/scratch/${USER}/a", node_local="/local"), {"USER": "ada"})
    assert (found.known, found.in_job) == ({"HPCUTILS_SCRATCH": "/scratch/ada/a", "HPCUTILS_NODE_CACHE": "/local"}, {})
    # The user's own word.
    assert site_folders(site(scratch="/scratch/$NOBODY"), {"HPCUTILS_SCRATCH": "/mine"}).known == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/scratch/$NOBODY", r"folders\.scratch: /scratch/\$NOBODY: \$NOBODY is not set here"),
        ("/scratch/${NOBODY}/$SLURM_JOB_ID", r"\$NOBODY is not set here"),
        ("scratch/$USER", "an absolute path was expected, got 'scratch/ada'"),
        ("local/$SLURM_JOB_ID", "an absolute path was expected, got 'local/'"),
        ("~/scratch", "an absolute path was expected"),
        ("/local/$SLURM_PROCID", "is another on each node"),
        ("/local/$SLURMD_NODENAME", "is another on each node"),
    ],
)
def test_what_cannot_be_filled_in_is_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        site_folders(site(scratch=text), {"USER": "ada"})


def test_a_folder_of_the_job_is_made_and_shown_under_the_jobs_own_number(tmp_path: Path, monkeypatch) -> None:
    """Also where the one who submits sits in a job already: the number is not that one's."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    local = f"{tmp_path}/it's local/$SLURM_JOB_ID/x"
    after = 'echo "$HPCUTILS_NODE_CACHE"; echo "$APPTAINER_BIND"'
    planned, done = run_script(tmp_path, site(node_local=local), after, SLURM_JOB_ID="77")
    folder = f"{tmp_path}/it's local/77/x"
    assert done.stderr == "" and done.stdout.splitlines()[0] == folder
    assert Path(folder).is_dir()
    assert folder.startswith("/tmp/") or done.stdout.splitlines()[1] == folder
    assert not any("SLURM_JOB_ID" in word or "local" in word for word in planned.python_argv)


def test_ranks_without_a_container_are_told_of_it_too(tmp_path: Path) -> None:
    _, done = run_script(tmp_path, site(node_local="$TMPDIR/x"), 'echo "$HPCUTILS_NODE_CACHE"', None, TMPDIR="/local/7")
    assert (done.stdout, done.stderr) == ("/local/7/x\n", "")


def failed(tmp_path: Path, done: subprocess.CompletedProcess[str]) -> str:
    """Return what is said of a job that gave up, after a look that everything says the same."""
    run = RunDirectory(tmp_path / "runs/a")
    assert done.returncode == RequestError.exit_code and "not reached" not in done.stdout
    assert run.exit_code.read_text() == f"{RequestError.exit_code}\n"
    message = json.loads(run.failure.read_text())["message"]
    assert "hpcutils: error: " in done.stderr
    reason = status(run).reason
    assert reason is not None and reason.endswith(message) and "rank" not in reason
    return str(message)


def test_a_folder_that_cannot_be_made_ends_the_job_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, done = run_script(tmp_path, site(scratch=f"{tmp_path}/file/x"), "echo not reached")
    assert f"a folder of the site or the job cannot be made on each node: {tmp_path}/file/x" in failed(tmp_path, done)


@pytest.mark.parametrize("value", ["", "relative", '/a"b', "/a,b", "/a:b"])
def test_a_value_that_is_no_folder_ends_the_job(tmp_path: Path, value: str) -> None:
    _, done = run_script(tmp_path, site(scratch="$TMPDIR"), "echo not reached", TMPDIR=value)
    assert "an absolute path was expected" in failed(tmp_path, done)
