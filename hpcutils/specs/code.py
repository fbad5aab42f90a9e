"""Which files of a job's folder are its code: these are copied beside each run, and the ranks see no others."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

LARGEST_FILE_BYTES = 1 << 20
SKIPPED = {"__pycache__", "runs", "node_modules"}
SUFFIXES = {".py", ".yaml", ".yml", ".toml", ".json", ".txt", ".md", ".cfg", ".ini", ".csv"}


def is_code_folder(name: str) -> bool:
    """Whether a folder of this name is looked into."""
    return name not in SKIPPED and not name.startswith(".")


def is_code(path: Path) -> bool:
    """Whether a file counts as code, by its name and size."""
    return (
        not path.name.startswith(".") and path.suffix in SUFFIXES and path.is_file() and path.stat().st_size <= LARGEST_FILE_BYTES
    )


def why_left_out(folder: Path, name: str) -> str | None:
    """Return why the file `name` of a job's folder is not copied with a run; `None` for one that is.

    Args:
        folder: The job's folder.
        name: The file, which exists.
    """
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return "only files in the folder of train.yaml are copied with a run; put it there"
    skipped = [part for part in relative.parts[:-1] if not is_code_folder(part)]
    if skipped or relative.name.startswith("."):
        return f"{skipped[0] if skipped else relative.name!r} is hidden or holds no code; move the file out of it"
    links = [parent for parent in relative.parents if (folder / parent).is_symlink() and parent.name]
    if links:
        return f"{links[0]} is a link to a folder, and such are not followed; link the file itself"
    if not is_code(folder / relative):
        return f"code files have at most {LARGEST_FILE_BYTES >> 20} MiB"
    return None
