"""What every rank runs. Light until it must not be: TensorFlow is imported after the environment is set.

Started by submitit inside the container (`run_rank` is the pickled callable), or by `python -m hpcutils.train.entry RUN`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from hpcutils import fs, log
from hpcutils.errors import HpcutilsError, JobFailedError
from hpcutils.rundir import RunDirectory
from hpcutils.train.stop import StoppedToGoOn
from hpcutils.world import World, world_from_environment


def run_rank(run_path: str) -> dict[str, Any]:
    """Train as one rank of the run in `run_path` and return the result; a failure ends this process with its exit code."""
    run = RunDirectory(Path(run_path))
    # submitit ignores SIGTERM, which would keep the ranks of a broken job alive until they are killed.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Until it knows better: an error in finding the world out must name the node, too.
    world = World(node=socket.gethostname())
    try:
        world = world_from_environment()
        log.configure(str(world))
        from hpcutils.train import main

        return main.train(run, world)
    except HpcutilsError as exc:
        _fail(run, world, exc)
    except StoppedToGoOn:
        raise
    except SystemExit as exc:
        # Whatever the number, it is not one of our exit codes; and 0 would leave the other ranks waiting.
        _fail(run, world, JobFailedError(f"the job's own code ended the process: sys.exit({exc.code!r})", "raise an error instead"))
    except Exception as exc:  # noqa: BLE001 - the process boundary: whatever it was, the job must end and say so
        traceback.print_exc()
        _fail(
            run,
            world,
            JobFailedError(f"{type(exc).__name__}: {exc}", "the traceback is above, in this rank's log"),
        )


def _fail(run: RunDirectory, world: World, error: HpcutilsError) -> NoReturn:
    """Say who failed and why, leave it in the run's record, and go without waiting for anybody.

    A rank that only raised would hang in MPI_Finalize for the others; Slurm ends the rest (`--kill-on-bad-exit`).
    """
    print(f"[{world}] error: {error}", file=sys.stderr, flush=True)
    record = {
        "rank": world.rank,
        "node": world.node,
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }
    temporary = fs.temporary_beside(run.failure)
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        # The first rank to fail names the cause; link fails for all later ones.
        with contextlib.suppress(FileExistsError):
            os.link(temporary, run.failure)
        temporary.unlink()
    sys.stdout.flush()
    os._exit(error.exit_code)


if __name__ == "__main__":
    run_rank(sys.argv[1])
