"""What of the caller's environment a builder, or a test, gets to see."""

from __future__ import annotations

import os

# Variables of a caller that sits in a job, or in a container of its own, say nothing about the build.
FOREIGN_PREFIXES = ("APPTAINER", "SINGULARITY", "SLURM_", "PMI", "OMPI_", "PYTHON", "LD_")


def plain_environment(**extra: str) -> dict[str, str]:
    """Return the caller's environment without what would lead a build or a test astray, and with `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_PREFIXES)}
    # mmdebstrap and mkfs tools live where an ordinary user's PATH may not look.
    return {**kept, "PATH": f"{kept.get('PATH', os.defpath)}:/usr/sbin:/sbin", **extra}
