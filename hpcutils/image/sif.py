"""Adding a folder to the file system of a SIF, in seconds: no layer is unpacked or packed again.

A SIF is a header and a list of objects: the definition, some metadata, and one squashfs image. mksquashfs can append to such an
image, and `apptainer sif new` and `sif add` put the objects together again.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from hpcutils.errors import ImageError
from hpcutils.shell import run

BLOCK_BYTES = 64 << 20
# Numbers that `apptainer sif add --help` gives: kinds of objects, and machines.
DEFINITION, PARTITION, JSON = "1", "4", "6"
ARCHITECTURES = {"x86_64": "2", "aarch64": "4", "ppc64le": "6", "s390x": "11"}


@dataclass(frozen=True)
class SifObject:
    """One object of a SIF.

    Args:
        number: Its number in the list.
        kind: As `apptainer sif list` calls it.
        start: Offset of its first byte.
        end: Offset after its last byte.
    """

    number: int
    kind: str
    start: int
    end: int


def parse_listing(listing: str) -> list[SifObject]:
    """Return the objects in the output of `apptainer sif list`."""
    rows = re.findall(r"^(\d+)\s*\|[^|]*\|[^|]*\|\s*(\d+)-(\d+)\s*\|(.*)$", listing, re.MULTILINE)
    return [SifObject(int(number), kind.strip(), int(start), int(end)) for number, start, end, kind in rows]


def parse_name(information: str) -> str:
    """Return an object's name from the output of `apptainer sif info`; Apptainer finds what it looks for by name."""
    match = re.search(r"^\s*Name:\s*([\w.-]+)\s*$", information, re.MULTILINE)
    if match is None:
        raise ImageError(f"an object of the SIF has no name: {information!r}", "build it again with --force")
    return match[1]


def append_folder(builder: str, image: Path, folder: Path, result: Path, work: Path, date_s: int) -> None:
    """Write `result`: the SIF `image` with everything in `folder` added to the root of its file system.

    Args:
        builder: Apptainer.
        image: The SIF to start from; it stays as it is.
        folder: What is added; its files belong to root in the image.
        result: Where the new SIF goes.
        work: A folder for as much again as the SIF.
        date_s: Date of the new file system, in seconds since 1970.

    Raises:
        ImageError: The SIF has another structure than Apptainer gives it, or a tool failed.
    """
    objects = parse_listing(run([builder, "sif", "list", str(image)], error=ImageError).stdout)
    squashfs = work / "image.squashfs"
    _extract(image, _only(objects, "Squashfs", image), squashfs)
    # No recovery file: it would go to the caller's home, and what is appended to is a copy.
    options = ["-all-root", "-no-recovery", "-no-progress", "-quiet", "-mkfs-time", str(date_s)]
    run(["mksquashfs", str(folder), str(squashfs), *options], error=ImageError)
    definition = work / "definition"
    _extract(image, _only(objects, "Def.FILE", image), definition)
    run([builder, "sif", "new", str(result)], error=ImageError)
    _add(builder, result, definition, DEFINITION)
    # Of what Apptainer knows of the image; one that stands on an OCI image has that one's configuration, too.
    for item in (item for item in objects if "JSON" in item.kind):
        metadata = work / parse_name(run([builder, "sif", "info", str(item.number), str(image)], error=ImageError).stdout)
        _extract(image, item, metadata)
        _add(builder, result, metadata, JSON, "--filename", metadata.name)
    # --parttype 2: the file system that is started; --partfs 1: squashfs.
    _add(builder, result, squashfs, PARTITION, "--parttype", "2", "--partfs", "1", "--partarch", _architecture())
    result.chmod(0o755)


def _add(builder: str, image: Path, file: Path, kind: str, *options: str) -> None:
    run([builder, "sif", "add", str(image), str(file), "--datatype", kind, "--groupid", "1", *options], error=ImageError)


def _only(objects: list[SifObject], kind: str, image: Path) -> SifObject:
    found = [item for item in objects if kind in item.kind]
    if len(found) != 1:
        raise ImageError(f"{image}: one object of kind {kind} was expected, it has {len(found)}", "build it again with --force")
    return found[0]


def _extract(image: Path, item: SifObject, target: Path) -> None:
    """Copy an object's bytes inside the kernel."""
    with image.open("rb") as source, target.open("wb") as sink:
        position = item.start
        while position < item.end:
            copied = os.sendfile(sink.fileno(), source.fileno(), position, min(BLOCK_BYTES, item.end - position))
            if copied == 0:
                raise ImageError(f"{image}: the file ends before its own list says so", "build it again with --force")
            position += copied


def _architecture() -> str:
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise ImageError(f"no SIF number is known for machines of type {machine}")
    return ARCHITECTURES[machine]
