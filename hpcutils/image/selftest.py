"""Testing an image: its own self-tests, run inside it, on this machine or over the nodes of a cluster."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcutils.errors import ImageError
from hpcutils.image.render import PYTHON, SOURCE
from hpcutils.shell import run

FOLDER = f"{SOURCE}/selftests"
TEST_S = 300.0
# The caller's folder for temporary files need not be there inside, and Open MPI makes its own in it.
TEST_ENVIRONMENT = {"TMPDIR": "/tmp"}
# Ranks of a test may outnumber the cores; in a container of Docker's they may be root.
MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe", "--mca", "mpi_yield_when_idle", "1")


@dataclass(frozen=True)
class Report:
    """What the self-tests of an image said.

    Args:
        checks: One mapping a check: `check`, `ok`, `seconds`, `seen`.
        packages: Versions of all packages, by kind (`python`, `debian`) and name.
        python: Version of the image's Python.
    """

    checks: tuple[Mapping[str, Any], ...] = ()
    packages: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    python: str = ""

    def failed(self) -> list[str]:
        """Return a line for each check that failed."""
        return [f"  {check['check']}: {check['seen']}" for check in self.checks if not check["ok"]]

    def with_output(self, stdout: str) -> Report:
        """Return this report and what one more test printed."""
        try:
            said = json.loads(stdout.splitlines()[-1])
            checks = tuple(said["checks"])
        except (IndexError, KeyError, TypeError, ValueError) as exc:
            raise ImageError(
                f"a self-test printed no report, but {stdout[-200:]!r}", "its last line has to be one JSON object"
            ) from exc
        return Report((*self.checks, *checks), said.get("packages") or self.packages, said.get("python") or self.python)


def slurm_words(nodes: int, ranks_per_node: int, options: Sequence[str] = (), mpi: str = "pmix") -> list[str]:
    """Return the words that start ranks over the nodes of a cluster."""
    counts = [f"--nodes={nodes}", f"--ntasks-per-node={ranks_per_node}"]
    return ["srun", f"--mpi={mpi}", "--kill-on-bad-exit=1", "--quiet", *counts, *options]


def command_words(enter: Sequence[str], script: str, ranks: int, launcher: Sequence[str] = ()) -> list[str]:
    """Return the command of one self-test.

    Args:
        enter: What runs a program inside the image.
        script: Name of the test in the image.
        ranks: How many ranks it asks for; a launcher knows better.
        launcher: What starts ranks, each in a container of its own; left out, `mpirun` starts them inside one container.
    """
    program = [PYTHON, f"{FOLDER}/{script}"]
    if launcher:
        return [*launcher, *enter, *program]
    return [*enter, *((*MPIRUN, "-n", str(ranks)) if ranks > 1 else ()), *program]


def run_self_tests(enter: Sequence[str], env: Mapping[str, str], launcher: Sequence[str] = ()) -> Report:
    """Run every self-test that an image has and return what they said; `failed` is for the caller to look at.

    Args:
        enter: What runs a program inside the image.
        env: The environment of that.
        launcher: See `command_words`.

    Raises:
        ImageError: The image has no self-tests, or one did not come to its end.
    """
    listing = run([*enter, "cat", f"{FOLDER}/list.json"], env=env, check=False)
    if listing.returncode != 0:
        raise ImageError(f"the image has no self-tests: {listing.stderr.strip()}", "'hpcutils build' puts them in")
    report = Report()
    for test in json.loads(listing.stdout):
        words = command_words(enter, test["script"], test["ranks"], launcher)
        report = report.with_output(run(words, env=env, timeout_s=TEST_S, error=ImageError).stdout)
    return report
