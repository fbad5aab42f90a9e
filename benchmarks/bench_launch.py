"""What the launcher costs: `--help` beside importing click, `submit` beside a ten-line submitit script, in one run.

python -m benchmarks.bench_launch        (as root; starts a sandbox cluster; the image must be built)
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.cluster import ENVIRONMENT, on_login, sandbox
from benchmarks.harness import compare

PYTHON = str(Path(sys.executable))
SCRIPT = """\
import sys

import submitit

executor = submitit.SlurmExecutor(folder=sys.argv[1])
executor.update_parameters(nodes=2, ntasks_per_node=1, gpus_per_node=4, time=5)
job = executor.submit(print, "hello")
print(job.job_id)
"""
PAIRS = 9


def cpu_s(words: list[str], folder: Path) -> float:
    """Return user and system seconds of a command on the login host, its children included, as /usr/bin/time sees them."""
    timer = "import os, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); t = os.times()"
    timed = [*("python", "-c", f"{timer}; print(t.children_user + t.children_system)"), *words]
    return float(on_login(*timed, cwd=folder).splitlines()[-1])


def submit_beside_submitit() -> None:
    with sandbox() as folder:
        (folder / "submit_print.py").write_text(SCRIPT)
        ours = ["hpcutils", "submit", "train.yaml", "--nodes", "2", "--gpus", "8", "--epochs", "1"]
        peer = ["python", "submit_print.py", str(folder / "peer")]
        pairs = []
        for number in range(PAIRS + 1):
            pair = (cpu_s(ours, folder), cpu_s(peer, folder))
            # A crowded queue would slow either one's sbatch down.
            on_login("scancel", "--user=hpcuser")
            if number:
                pairs.append(pair)
        ratios = sorted(own / theirs for own, theirs in pairs)
        own_s, peer_s = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"CPU time of submit: hpcutils {own_s:.3f} s, ten-line submitit script {peer_s:.3f} s, "
            f"ours/peer {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] (limit 3)"
        )


def run(*words: str) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def help_beside_click() -> None:
    script = str(Path(PYTHON).with_name("hpcutils"))
    rows = compare(
        "hpcutils --help",
        lambda: run(script, "--help"),
        {"python -c 'import click'": lambda: run(PYTHON, "-c", "import click")},
        repeats=15,
    )
    print(f"time of --help: ours/peer {1 / rows[0].ratio_median:.2f} (limit 2.5)")


if __name__ == "__main__":
    print(time.strftime("%Y-%m-%d"), "sandbox:", ENVIRONMENT["HPCUTILS_SANDBOX_NAME"])
    help_beside_click()
    submit_beside_submitit()
