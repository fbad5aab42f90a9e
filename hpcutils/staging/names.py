"""Sees that no path comes twice, without keeping the paths: as long as they come in order, the last one is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class Names:
    """The paths of a manifest, one after the other.

    Sorted, folder by folder, as `find_files` gives them, a path that comes twice comes at once. At the first one that is out of
    order those before it are read again, and from there on 64 bits of each are kept: 60 MB for a million, which meet by chance once
    in ten million manifests.

    Args:
        before: Returns the paths that came until now.
    """

    def __init__(self, before: Callable[[], Iterable[str]]) -> None:
        self._before = before
        self._last: list[str] = []
        self._seen: set[int] | None = None

    def trouble(self, path: str) -> str | None:
        """Take note of the next path; returns what is wrong with it, or `None`."""
        parts = path.split("/")
        if self._seen is None:
            if parts > self._last:
                below = bool(self._last) and parts[: len(self._last)] == self._last
                self._last = parts
                return "lies below a file" if below else None
            if parts == self._last:
                return "is listed twice"
            self._seen = {hash(name) for name in self._before()}
        count = len(self._seen)
        self._seen.add(hash(path))
        return "is listed twice" if len(self._seen) == count else None
