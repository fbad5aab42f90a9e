"""A sandbox cluster for benchmarks, with a folder of its ordinary user that goes away at the end."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANDBOX = ROOT / "slurm" / "sandbox"
ENVIRONMENT = os.environ | {"HPCUTILS_SANDBOX_NAME": "bench"}


@contextlib.contextmanager
def sandbox(nodes: int = 2, gpus: int = 4) -> Iterator[Path]:
    """Yield a folder on the shared file system while a cluster is up."""
    subprocess.run([str(SANDBOX), "up", "--replace", "--nodes", str(nodes), "--gpus", str(gpus)], env=ENVIRONMENT, check=True)
    folder = Path(pwd.getpwnam("hpcuser").pw_dir) / f"bench-{os.getpid()}"
    try:
        on_login("mkdir", "-p", str(folder))
        for name in ("train.yaml", "model.py", "make_data.py"):
            on_login("cp", str(ROOT / "jobs" / "digits" / name), str(folder))
        on_login("python", "make_data.py", cwd=folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([str(SANDBOX), "down"], env=ENVIRONMENT, check=True)


def login_argv(*words: str, cwd: Path | None = None) -> list[str]:
    """Return the command that runs `words` as the ordinary user on the login host."""
    where = ["--cwd", str(cwd)] if cwd is not None else []
    return [str(SANDBOX), "exec", *where, "--", *words]


def on_login(*words: str, cwd: Path | None = None) -> str:
    """Run a command as the ordinary user on the login host and return its standard output."""
    return subprocess.run(login_argv(*words, cwd=cwd), env=ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True).stdout
