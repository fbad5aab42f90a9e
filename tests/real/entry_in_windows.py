"""`hpcutils.train.entry` where memory is as good as full, so that a small data set is read in windows; may be asked to stop.

    python entry_in_windows.py RUN [STEP [EPOCH]]

After STEP steps of its first epoch (or of EPOCH, counted from 0) the run is asked to stop, as Slurm does near the time limit.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# As `train.devices.prepare` does for simulated devices, before TensorFlow is imported below.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

from hpcutils.data import shards
from hpcutils.train import entry, reading


def main() -> None:
    run, numbers = Path(sys.argv[1]), [int(word) for word in sys.argv[2:]]
    shards.POOL_BYTES = 64 << 10
    reading.free_memory_bytes = lambda: 1 << 20
    if numbers:
        stop_after(run, *numbers)
    entry.run_rank(str(run))


def stop_after(run: Path, step: int, epoch: int | None = None) -> None:
    from hpcutils.train import record, steps

    record.LOOK_S, steps.STEPS_PER_CALL = -1.0, 1
    look = record.Recorder._look_for_stop

    def ask_and_look(self: Any) -> None:
        if self._train.runner.done == step and epoch in (None, self._epoch) and self.ranks.world.rank == 0:
            (run / "stop").touch()
        look(self)

    record.Recorder._look_for_stop = ask_and_look


if __name__ == "__main__":
    main()
