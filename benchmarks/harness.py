"""Compare our call with its peers' in one process: interleaved runs, ratios pair by pair, the spread beside the median.

A ratio is `peer time / our time`: above 1 means that ours is faster. Interleaving (ours, peer, ours, peer, …) keeps a
machine whose speed drifts from favouring either side. Nothing here passes or fails: a reader judges the figures.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Ratio:
    """One comparison: medians in seconds, and peer/ours over the pairs."""

    case: str
    peer: str
    ours_s: float
    peer_s: float
    ratio_median: float
    ratio_min: float
    ratio_max: float

    def line(self) -> str:
        return (
            f"{self.case:<44} {self.peer:<30} ours {self.ours_s * 1e3:10.2f} ms   peer {self.peer_s * 1e3:10.2f} ms   "
            f"x{self.ratio_median:.2f} [{self.ratio_min:.2f}, {self.ratio_max:.2f}]"
        )


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of wall time that one `call()` takes, with the garbage collector quiet.

    What a call leaves behind it may remove in a method `tidy`, which is called when the clock has stopped.
    """
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    finally:
        gc.enable()
        getattr(call, "tidy", lambda: None)()


def compare(case: str, ours: Callable[[], object], peers: Mapping[str, Callable[[], object]], repeats: int = 7) -> list[Ratio]:
    """Time `ours` beside each of `peers`, after one warm-up of each, and print a line a peer."""
    rows = []
    for name, peer in peers.items():
        timed(ours)
        timed(peer)
        pairs = [(timed(ours), timed(peer)) for _ in range(repeats)]
        ratios = [theirs / own for own, theirs in pairs]
        own_s, peer_s = (statistics.median(column) for column in zip(*pairs, strict=True))
        row = Ratio(case, name, own_s, peer_s, statistics.median(ratios), min(ratios), max(ratios))
        print(row.line(), flush=True)
        rows.append(row)
    return rows


def report(rows: list[Ratio]) -> None:
    """Print the rows as JSON lines when the caller asked for them with `--json`."""
    if "--json" in sys.argv:
        for row in rows:
            print(json.dumps(asdict(row)))
