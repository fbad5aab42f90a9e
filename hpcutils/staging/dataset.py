"""What is to be on a node: a manifest's files, or one file that is known by its digest, or by its size and time alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hpcutils.staging.manifest import FORMAT, SEGMENT_BYTES, Entry, Manifest
from hpcutils.staging.segments import Segment, cut

# A file without a manifest is cut by its size and the number of nodes; a smaller part is not worth a message of its own.
SMALLEST_SEGMENT_BYTES = 4 << 20


@dataclass(frozen=True)
class Dataset:
    """Files that are staged, kept and evicted together.

    Args:
        name: What it is called in messages.
        kind: How it is known: `manifest` or `sha256` by a digest, `stat` by its source's path, size and time.
        key: Hexadecimal digest; kind and key name its folder in the cache.
        segment_bytes: Bytes of a segment.
        manifest: Its files, or
        entry: its one file.
    """

    name: str
    kind: str
    key: str
    segment_bytes: int
    manifest: Manifest | None = None
    entry: Entry | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return self.manifest.total.size_bytes if self.manifest is not None else self._one.size_bytes

    @property
    def files(self) -> int:
        """Number of files."""
        return self.manifest.total.files if self.manifest is not None else 1

    @property
    def segment_count(self) -> int:
        """Number of segments."""
        return self.manifest.segments if self.manifest is not None else max(1, -(-self.size_bytes // self.segment_bytes))

    @property
    def _one(self) -> Entry:
        assert self.entry is not None
        return self.entry

    def entries(self) -> Iterator[Entry]:
        """Yield the files in order."""
        return self.manifest.entries() if self.manifest is not None else iter([self._one])

    def segments(self) -> Iterator[Segment]:
        """Yield the segments in order."""
        if self.manifest is not None:
            return cut(self.manifest.entries(), self.segment_bytes, self.manifest.total.tail)
        return cut([self._one], self.segment_bytes, known=False)

    def manifest_lines(self, digests: Iterable[str], sha256: str) -> Iterator[str]:
        """Yield the manifest of a single file, now that its digests are known."""
        listed = list(digests)
        full = self.size_bytes // self.segment_bytes
        tail = listed[full] if len(listed) > full else None
        yield f'{{"format":"{FORMAT}","segment_bytes":{self.segment_bytes}}}\n'
        yield Entry(self._one.path, self.size_bytes, sha256, tuple(listed[:full])).line()
        yield f'{{"files":1,"size":{self.size_bytes},"tail":{"null" if tail is None else chr(34) + tail + chr(34)}}}\n'


def dataset_of_manifest(manifest: Manifest) -> Dataset:
    """Return the dataset that a manifest lists; the manifest's own digest is its key."""
    return Dataset(manifest.path.name, "manifest", manifest.digest(), manifest.segment_bytes, manifest)


def dataset_of_file(name: str, size_bytes: int, sha256: str | None, identity: str = "", nodes: int = 1) -> Dataset:
    """Return the dataset of one file.

    Args:
        name: The file's own name.
        size_bytes: Its length.
        sha256: What it must hash to; without one `identity` is what it is known by.
        identity: Where it comes from, its size and its time.
        nodes: How many share the reading.
    """
    # The same bytes under two names are two datasets: whoever opens one looks for its name.
    mark = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8]
    kind, key = (
        ("sha256", f"{sha256}-{mark}")
        if sha256 is not None
        else ("stat", hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest())
    )
    # A few segments a node at least: reading, moving, writing and hashing go on at the same time, each on another one.
    share = -(-size_bytes // (16 * nodes))
    segment = min(SEGMENT_BYTES, max(SMALLEST_SEGMENT_BYTES, -(-share // (1 << 20)) << 20))
    return Dataset(name, kind, key, segment, entry=Entry(name, size_bytes, sha256))
