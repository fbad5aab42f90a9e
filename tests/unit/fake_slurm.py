"""Stand-ins for Slurm's commands: shell scripts in a folder that goes first on the PATH, and what they were asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

JOB = """\
name: tiny
data:
  files:
    - path: data.h5
  x: images
  y: labels
model:
  function: model.py:build
training:
  epochs: 1
  batch_size: 8
  loss: mse
"""


@dataclass(frozen=True)
class FakeSlurm:
    """Commands that answer as they are told to, beside the folder of a small job.

    Args:
        bin: Folder of the commands.
        job: Folder of a `train.yaml` that names no image.
    """

    bin: Path
    job: Path

    def command(self, name: str, script: str) -> None:
        """Make `name` a command: it notes its words in `NAME.asked`, then does `script`."""
        path = self.bin / name
        path.write_text(f'#!/bin/bash\necho "$@" >> {self.bin}/{name}.asked\n{script}\n')
        path.chmod(0o755)

    def asked(self, name: str) -> list[str]:
        """Return the words of each call of `name`."""
        log = self.bin / f"{name}.asked"
        return log.read_text().splitlines() if log.exists() else []

    @property
    def environ(self) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}

    def start(self, *words: str, **environ: str) -> subprocess.Popen[str]:
        """Start `hpcutils WORDS` in the job's folder."""
        return subprocess.Popen(
            [sys.executable, "-m", "hpcutils", *words], cwd=self.job, env=self.environ | environ,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # A shell starts what it puts into the background with SIGINT ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run `hpcutils WORDS` to its end."""
        process = self.start(*words, **environ)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def interrupt(self, process: subprocess.Popen[str], when: Path, number: signal.Signals) -> tuple[str, str]:
        """Send a signal as soon as the file `when` is there; return what the process then printed."""
        deadline = time.monotonic() + 60
        while not when.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"{when} did not appear"
            time.sleep(0.02)
        process.send_signal(number)
        return process.communicate(timeout=60)

    def runs(self) -> list[Path]:
        """Return the run directories."""
        folder = self.job / "runs"
        return sorted(folder.iterdir()) if folder.exists() else []


def fake_slurm(folder: Path) -> FakeSlurm:
    """Return a fake Slurm in `folder` whose sbatch accepts every job as number 77."""
    slurm = FakeSlurm(folder / "bin", folder / "job")
    slurm.bin.mkdir()
    slurm.job.mkdir()
    (slurm.job / "train.yaml").write_text(JOB)
    (slurm.job / "model.py").write_text("def build(): ...\n")
    (slurm.job / "data.h5").write_bytes(b"")
    slurm.command("srun", "exit 1")
    slurm.command("scancel", "")
    slurm.command("sbatch", "echo Submitted batch job 77")
    return slurm
