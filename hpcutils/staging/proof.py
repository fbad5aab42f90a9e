"""Is a complete dataset still what its list says: every segment hashed again, in place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpcutils import fs
from hpcutils.errors import DataError, IntegrityError, SpecError
from hpcutils.staging import store
from hpcutils.staging.load import digest_of
from hpcutils.staging.manifest import Manifest, read_manifest
from hpcutils.staging.origins import FolderOrigin
from hpcutils.staging.segments import cut
from hpcutils.staging.store import FILES, LIST, MARKER, SEGMENTS, Head, Place


def trouble(place: Place) -> list[str]:
    """Return what is wrong with a complete dataset: files that do not prove right, or what is kept about them."""
    try:
        manifest, digest = _listed(place)
        head = store.read_head(place.entry)
        known = place.kind in ("stat", "unpacked") or place.key.startswith(digest)
        if head is None or (head.size_bytes, head.digest) != (manifest.total.size_bytes, digest) or not known:
            return ["(its list of files, or its marker)"]
        wrong = list(dict.fromkeys(_wrong_files(place.entry)))
    except SpecError as exc:
        return [exc.message]
    return wrong or ([] if store.is_intact(place.entry) else ["(a file's time, or a file too many)"])


def _listed(place: Place) -> tuple[Manifest, str]:
    """Return the list of a dataset's files, and the digest that the dataset is known by.

    Raises:
        SpecError: The list cannot be read.
    """
    manifest = read_manifest(place.entry / LIST)
    if place.kind in ("manifest", "unpacked"):
        return manifest, manifest.digest()
    first = next(manifest.entries(), None)
    return manifest, (first.sha256 if first is not None else None) or "none"


def remark(place: Place, name: str) -> bool:
    """Write the marker anew where it alone, or files' times, are not what they were; says whether it did.

    Every byte is proved first, and none is touched: a running job may read them.

    Args:
        place: A dataset that has its name.
        name: What it is called, should its marker not say.

    Raises:
        OSError: The disk refuses.
    """
    try:
        manifest, digest = _listed(place)
        head = store.read_head(place.entry)
        if head is None and place.kind in ("manifest", "sha256") and place.key.startswith(digest):
            head = Head(name, manifest.total.files, manifest.total.size_bytes, digest, 0, 0.0)
        if head is None or (head.size_bytes, head.digest) != (manifest.total.size_bytes, digest):
            return False
        finished = store.read_finished(place.entry, manifest.segment_bytes)
        if len(finished) != manifest.segments and (place.entry / SEGMENTS).exists():
            return False
        if next(_wrong_files(place.entry), None) is not None:
            return False
        with fs.publishing(place.entry / MARKER) as temporary, temporary.open("w", encoding="ascii") as stream:
            folders = sum(1 for line in store.marker_lines(place.entry / FILES, head) if stream.write(line)) - 2
            if place.kind != "unpacked" and folders != len(_folders(manifest)):
                raise IntegrityError("a folder too many")
    except (SpecError, IntegrityError):
        return False
    return True


def _folders(manifest: Manifest) -> set[str]:
    """Return the folders of a dataset's files, and those that they are in."""
    found = {""}
    for entry in manifest.entries():
        inside = entry.path.rpartition("/")[0]
        while inside not in found:
            found.add(inside)
            inside = inside.rpartition("/")[0]
    return found


def _wrong_files(folder: Path) -> Iterator[str]:
    manifest = read_manifest(folder / LIST)
    files = folder / FILES
    origin = FolderOrigin(lambda path: files / path, follow=False)
    memory = memoryview(bytearray(min(manifest.segment_bytes, manifest.total.size_bytes)))
    for segment in cut(manifest.entries(), manifest.segment_bytes, manifest.total.tail):
        data, lost = memory[: segment.size_bytes], False
        for piece in segment.pieces:
            try:
                origin.read(piece, data[piece.at : piece.at + piece.size_bytes])
            except DataError:
                lost = True
                yield piece.path
        if not lost and digest_of(data) != segment.digest:
            yield from (piece.path for piece in segment.pieces)
    origin.close()
