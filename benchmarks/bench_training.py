"""Steps per second and memory of a rank: hpcutils beside a hand-written Horovod script; same model, data, image, cluster.

    python -m benchmarks.bench_training [EPOCHS]      (as root; starts a sandbox cluster; the image must be built)

Both run alternately through srun and the SIF on two nodes with one rank each. The first two epochs (tracing) are left out; both
count the steps that they took. hpcutils also validates in each epoch: that is not in its epoch's time, since the script does not.
A run's figure is that of its fastest quarter of epochs (the quartile): on a machine whose processors are shared with others most
epochs are held up by them; the median of all epochs is printed beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from benchmarks.cluster import ROOT, on_login, sandbox

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 30
PAIRS = 5
BATCH = 64
SKIPPED = 2


def ours(folder: Path) -> tuple[list[float], float]:
    """Return the steps/s of each epoch and the peak MB of a rank of an hpcutils job."""
    words = ("submit", "train.yaml", "--nodes", "2", "--gpus", "2", "--epochs", str(EPOCHS), "--follow", "--json")
    run = Path(json.loads(on_login("hpcutils", *words, cwd=folder))["path"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][SKIPPED:]
    result = json.loads((run / "result.json").read_text())
    return [line["steps"] / line["seconds"] for line in lines], result["peak_rss_mb"][0]


def theirs(folder: Path) -> tuple[list[float], float]:
    """Return the same of the hand-written script, started by the same srun and exec line."""
    on_login("cp", str(ROOT / "benchmarks" / "handwritten_horovod.py"), str(folder))
    image = on_login("hpcutils", "build", "tf-horovod-cpu", "--json", cwd=folder)
    sif = json.loads(image.splitlines()[-1])["path"]
    variables = ("OMPI_MCA_btl_vader_single_copy_mechanism=none", "PMIX_MCA_gds=hash", "OMPI_MCA_mpi_yield_when_idle=1")
    words = ["srun", "--mpi=pmix", "-N", "2", "--ntasks-per-node=1", "--gpus-per-node=1", "env", *variables]
    words += ["apptainer", "--quiet", "exec", "--no-home", "--bind", str(folder), sif]
    words += ["python3", str(folder / "handwritten_horovod.py"), str(folder), str(EPOCHS), str(BATCH)]
    said = json.loads(on_login(*words, cwd=folder).splitlines()[-1])
    return [said["steps"] / seconds for seconds in said["epoch_s"][SKIPPED:]], said["peak_mb"]


def quartile(figures: list[float]) -> float:
    """Return what a quarter of the figures exceed."""
    return statistics.quantiles(figures, n=4)[2]


def shown(figures: list[float]) -> str:
    return f"{quartile(figures):6.1f} steps/s (median {statistics.median(figures):6.1f})"


def main() -> None:
    with sandbox() as folder:
        pairs = [(ours(folder), theirs(folder)) for _ in range(PAIRS)]
    for own, their in pairs:
        print(f"hpcutils {shown(own[0])} {own[1]:6.0f} MB    script {shown(their[0])} {their[1]:6.0f} MB")
    for name, figure in (("fastest quarter", quartile), ("median", statistics.median)):
        ratios = sorted(figure(own[0]) / figure(their[0]) for own, their in pairs)
        print(f"steps/s ours/script, {name}: {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] (target 1.0)")
    extra = [own[1] - their[1] for own, their in pairs]
    print(f"memory of a rank, ours - script: {statistics.median(extra):.0f} MB [{min(extra):.0f}, {max(extra):.0f}] (limit 60)")


if __name__ == "__main__":
    main()
