"""The images that can be named here: the site's, and those that were built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hpcutils.image.find import Image, find_image, images_folder, read_sidecar
from hpcutils.specs.site import PublishedImage, Site, Status

ENDINGS = (".sif", ".oci.tar")


@dataclass(frozen=True)
class Row:
    """One image of the list.

    Args:
        name: What to write in train.yaml.
        status: `current`, `deprecated`, `withdrawn` for the site's; `built` or `older` for one's own.
        digest: The first digits of the digest of all that went in.
        size_bytes: Size of the file.
        path: The file.
        note: What the site says of it.
    """

    name: str
    status: str
    digest: str
    size_bytes: int
    path: str
    note: str = ""


def list_images(site: Site, environ: Mapping[str, str] | None = None) -> list[Row]:
    """Return the site's images by alias, then those in the images' folder by name."""
    return [_published(alias, image) for alias, image in site.images.items()] + _built(images_folder(environ))


def published_paths(site: Site) -> dict[str, Path]:
    """Return where the site's images are, by alias."""
    return {alias: Path(image.path) for alias, image in site.images.items()}


def known_image(name: str, site: Site) -> tuple[Image, PublishedImage | None]:
    """Return the image that `name` means, and what the site says of it: by its alias, or of the very file that a path leads to."""
    image = find_image(name, published=published_paths(site))
    return image, site.images.get(name) or _said_of_file(image.path, site)


def _said_of_file(path: Path, site: Site) -> PublishedImage | None:
    """Return what the site says of a file; of several aliases, the one that vouches most for it."""
    said = [image for image in site.images.values() if Path(image.path).resolve() == path]
    return min(said, key=lambda image: get_args(Status).index(image.status), default=None)


def details(image: Image, published: PublishedImage | None) -> dict[str, Any]:
    """Return all that is known of an image but its packages."""
    known = {key: value for key, value in image.sidecar.items() if key not in ("packages", "self_test")}
    counts = {kind: len(found) for kind, found in (image.sidecar.get("packages") or {}).items()}
    checks = image.sidecar.get("self_test") or []
    passed = f"{sum(bool(check['ok']) for check in checks)} of {len(checks)} passed"
    said = {} if published is None else {"published": published.model_dump(exclude_none=True)}
    return {"path": str(image.path), **known, "packages": counts, "self_test": passed, **said}


def breakdown(sizes: Mapping[str, Any], shown: int = 12) -> list[str]:
    """Return the lines of a table of an image's largest packages, from what `inside.py sizes` said. Pure."""
    rows = [(size, f"{kind} {name}") for kind in ("python", "debian") for name, size in sizes[kind].items()]
    rows.sort(reverse=True)
    total, known = sizes["all_files"], sum(size for size, _ in rows)
    lines = [f"{size / 1e6:9.1f} MB  {name}" for size, name in rows[:shown]]
    lines += [f"{sum(size for size, _ in rows[shown:]) / 1e6:9.1f} MB  {len(rows[shown:])} other packages"] if rows[shown:] else []
    lines += [f"{max(total - known, 0) / 1e6:9.1f} MB  files of no package"]
    return [*lines, f"{total / 1e6:9.1f} MB  in all, {total / max(known, 1):.2f} times what its packages need"]


def _published(alias: str, image: PublishedImage) -> Row:
    path = Path(image.path)
    size_bytes = path.stat().st_size if path.is_file() else 0
    return Row(alias, image.status, str(read_sidecar(path).get("digest", ""))[:12], size_bytes, image.path, image.note)


def _built(folder: Path) -> list[Row]:
    rows = []
    named = {path.resolve() for path in folder.glob("*") if path.is_symlink()}
    for path in sorted(folder.glob("*")):
        if path.is_symlink() or not path.name.endswith(ENDINGS) or path.name.startswith("."):
            continue
        sidecar = read_sidecar(path)
        name = sidecar.get("name") or re.sub(r"\.(sif|oci\.tar)$", "", path.name)
        status = "built" if path.resolve() in named else "older"
        rows.append(Row(name, status, str(sidecar.get("digest", ""))[:12], path.stat().st_size, str(path)))
    return rows
