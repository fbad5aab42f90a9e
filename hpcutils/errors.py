"""The error tree: every failure that a user can meet, with its exit code.

    HpcutilsError               1   anything below; also an internal error
    ├── SpecError               2   train.yaml, a recipe, a site file or the command line cannot be read as meant
    ├── RequestError            3   well-formed, but asks for something impossible (7 GPUs on 2 nodes)
    ├── ImageError              4   a container image is missing, cannot be built, or is not what it says
    ├── DataError               5   a dataset is missing, unreadable or of the wrong shape
    │   └── IntegrityError      6   bytes arrived, and they are not the ones that were asked for (also a ValueError)
    ├── SlurmRejectedError      7   Slurm answered, and said no
    ├── SlurmUnavailableError   8   Slurm did not answer, or is not installed
    ├── JobFailedError          9   a job ran and failed, for a reason that is none of the others
    ├── WorldError             10   the ranks do not agree on who they are
    ├── DeviceError            11   the devices that were asked for are not there (also a ValueError)
    ├── MissingPartError       12   a program or package that this step needs is not installed
    ├── ArchiveError           13   an archive is damaged or tries to write outside its folder
    └── InterruptError        130   Ctrl-C or SIGTERM ended the command; the message says what became of the job

75 (EX_TEMPFAIL) is kept for a job that stopped at a checkpoint and wants to be run again.
A test holds `docs/reference/exit-codes.md` to this table.
"""

from __future__ import annotations

EXIT_REQUEUE = 75


class HpcutilsError(Exception):
    """Base of the tree.

    Args:
        message: What was given and what was expected, one or more lines.
        hint: What to do next, or `None` where nothing but the message helps.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process boundaries (worker pools, submitit): args alone would lose the hint.
        return (type(self), (self.message, self.hint))


class SpecError(HpcutilsError):
    """A file or a command line that cannot be read as meant."""

    exit_code = 2


class RequestError(HpcutilsError):
    """A well-formed request for something impossible."""

    exit_code = 3


class ImageError(HpcutilsError):
    """A container image is missing, cannot be built, or is not what it says."""

    exit_code = 4


class DataError(HpcutilsError):
    """A dataset is missing, unreadable or of the wrong shape."""

    exit_code = 5


class IntegrityError(DataError, ValueError):
    """Bytes arrived that are not the ones that were asked for."""

    exit_code = 6


class SlurmRejectedError(HpcutilsError):
    """Slurm answered, and said no."""

    exit_code = 7


class SlurmUnavailableError(HpcutilsError):
    """Slurm did not answer, or is not installed here."""

    exit_code = 8


class JobFailedError(HpcutilsError):
    """A job ran and failed, for a reason that has no class of its own."""

    exit_code = 9


class WorldError(HpcutilsError):
    """The ranks do not agree on who they are."""

    exit_code = 10


class DeviceError(HpcutilsError, ValueError):
    """The devices that were asked for are not there."""

    exit_code = 11


class MissingPartError(HpcutilsError, ImportError):
    """A program or package that this step needs is not installed."""

    exit_code = 12


class ArchiveError(DataError):
    """An archive is damaged, too large, or tries to write outside its folder."""

    exit_code = 13


class InterruptError(HpcutilsError):
    """Ctrl-C or SIGTERM ended the command."""

    exit_code = 130


def tree(root: type[HpcutilsError] = HpcutilsError) -> list[type[HpcutilsError]]:
    """Return `root` and every class below it, each once, parents first."""
    found = [root]
    for child in root.__subclasses__():
        found += [cls for cls in tree(child) if cls not in found]
    return found


def by_exit_code(code: int) -> type[HpcutilsError]:
    """Return the class whose exit code is `code`; `JobFailedError` for a code that belongs to none."""
    return next((cls for cls in tree() if cls.exit_code == code), JobFailedError)
