"""Where images are, and what starts them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcutils.errors import ImageError, MissingPartError

# Where containers/install-apptainer puts Apptainer on machines whose distribution has none.
OWN_BUILDER = Path("/opt/hpcutils/apptainer/usr/bin/apptainer")
BUILDER_NAMES = ("apptainer", "singularity")


@dataclass(frozen=True)
class Image:
    """An image file, and what its sidecar says.

    Args:
        path: The file itself, not a link to it: what it is cannot change while a job waits.
        name: The name that it was built under; the file's own for one without a sidecar.
        digest: Digest of all that went into it; empty without a sidecar.
        sha256: Digest of the file; empty without a sidecar.
        sidecar: The whole sidecar.
    """

    path: Path
    name: str
    digest: str
    sha256: str
    sidecar: Mapping[str, Any]


def cache_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Return the folder of layers and compiled wheels."""
    variables = os.environ if environ is None else environ
    return Path(variables.get("HPCUTILS_CACHE") or Path(variables.get("HOME") or Path.home()) / ".cache/hpcutils")


def images_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Return the folder of finished images: $HPCUTILS_IMAGES, or `images` in the cache."""
    variables = os.environ if environ is None else environ
    return Path(variables.get("HPCUTILS_IMAGES") or cache_folder(variables) / "images")


def find_image(name: str, environ: Mapping[str, str] | None = None, published: Mapping[str, Path] | None = None) -> Image:
    """Return the image that `name` means: a path (with a `/` or a file's ending), an alias of the site, or a name that was built.

    Args:
        name: What a person wrote.
        environ: Variables that say where images are; ours when left out.
        published: The site's images by alias; they go before what was built here, as they are the same for everybody.

    Raises:
        ImageError: There is none.
    """
    is_path = "/" in name or name.endswith((".sif", ".oci.tar"))
    path = Path(name).expanduser() if is_path else (published or {}).get(name) or images_folder(environ) / f"{name}.sif"
    # Not `path.is_file()`: that one raises for a name longer than any file's.
    if not os.path.isfile(path):  # noqa: PTH113
        hint = "give the path of a SIF, or a name that was built" if is_path else f"hpcutils build {name}"
        raise ImageError(f"no such image: {path}", "tell whoever keeps the site's images" if name in (published or {}) else hint)
    real = path.resolve()
    sidecar = read_sidecar(real)
    return Image(real, sidecar.get("name", real.stem), sidecar.get("digest", ""), sidecar.get("sha256", ""), sidecar)


def sidecar_of(image: Path) -> Path:
    """Return where the sidecar of an image file is."""
    return image.with_suffix(".json")


def sbom_of(image: Path) -> Path:
    """Return where the list of an image's packages is, as CycloneDX."""
    return image.with_suffix(".cdx.json")


def read_sidecar(image: Path) -> dict[str, Any]:
    """Return the sidecar of an image file; nothing for one that has none, or a broken one."""
    try:
        content = json.loads(sidecar_of(image).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def find_builder() -> str:
    """Return the Apptainer (or Singularity) of this machine.

    Raises:
        MissingPartError: There is none.
    """
    found = next((path for name in BUILDER_NAMES if (path := shutil.which(name))), None)
    if found is not None:
        return found
    if OWN_BUILDER.is_file():
        return str(OWN_BUILDER)
    raise MissingPartError("no Apptainer on PATH", "run containers/install-apptainer as root, or load the site's module")
