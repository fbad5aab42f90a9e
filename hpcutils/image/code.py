"""hpcutils' own code as it lies in an image: the package, its metadata and its command."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import hpcutils
from hpcutils.image.render import PYTHON
from hpcutils.specs.recipe import RecipeFiles

# The date of every file of hpcutils in an image: what they say counts, not when they were written.
DATE_S = 1735689600

COMMAND = f"#!{PYTHON}\nimport sys\n\nfrom hpcutils.cli import main\n\nsys.exit(main())\n"


@dataclass(frozen=True)
class CodeFile:
    """A file of the code layer.

    Args:
        name: Path under the layer's folder, with `/`.
        content: Its bytes.
        executable: Whether it may be executed.
    """

    name: str
    content: bytes
    executable: bool = False


def code_files(package: Path | None = None) -> tuple[CodeFile, ...]:
    """Return the files of the layer, from the checkout or the installed package that this process runs from.

    Args:
        package: Folder of another hpcutils package.
    """
    root = package or Path(hpcutils.__file__).parent
    found = sorted(path for path in root.rglob("*") if path.is_file() and _belongs(path.relative_to(root)))
    code = [CodeFile(f"hpcutils/{p.relative_to(root).as_posix()}", p.read_bytes(), bool(p.stat().st_mode & 0o111)) for p in found]
    return (*code, *_metadata(hpcutils.__version__), CodeFile("bin/hpcutils", COMMAND.encode(), executable=True))


def self_test_files(files: RecipeFiles) -> tuple[CodeFile, ...]:
    """Return a recipe's self-tests as they lie in the image, and the list of them: an image can be tested wherever it goes."""
    tests = list(zip(files.recipe.self_test, files.self_tests, strict=True))
    listing = [{"script": f"{i}.py", "ranks": test.ranks} for i, (test, _) in enumerate(tests)]
    scripts = [CodeFile(f"selftests/{i}.py", text.encode()) for i, (_, text) in enumerate(tests)]
    return (*scripts, CodeFile("selftests/list.json", json.dumps(listing).encode()))


def _belongs(path: Path) -> bool:
    return path.suffix not in (".pyc", ".pyo") and not any(part == "__pycache__" or part.startswith(".") for part in path.parts)


def _metadata(version: str) -> tuple[CodeFile, ...]:
    """What `importlib.metadata` reads: tools in the image can ask for hpcutils' version."""
    folder = f"hpcutils-{version}.dist-info"
    return (
        CodeFile(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: hpcutils\nVersion: {version}\n".encode()),
        CodeFile(f"{folder}/entry_points.txt", b"[console_scripts]\nhpcutils = hpcutils.cli:main\n"),
    )


def write_code(files: Iterable[CodeFile], folder: Path) -> None:
    """Write the layer's files into `folder`."""
    for file in files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.content)
        path.chmod(0o755 if file.executable else 0o644)


def settle_dates(folder: Path) -> None:
    """Give everything under `folder` the same date and plain folder modes, so that equal code gives equal layers."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            os.utime(Path(parent) / name, (DATE_S, DATE_S))
        Path(parent).chmod(0o755)
        os.utime(parent, (DATE_S, DATE_S))
