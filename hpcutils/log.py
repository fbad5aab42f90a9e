"""Lines on stderr, each with the rank that wrote it; results alone go to stdout."""

from __future__ import annotations

import logging
import sys

LOGGER = logging.getLogger("hpcutils")


def configure(prefix: str = "hpcutils", level: int = logging.INFO) -> None:
    """Send hpcutils' log to stderr with `prefix` (a rank calls this with `rank 3 node1`)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[{prefix}] %(message)s"))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(level)
    LOGGER.propagate = False
