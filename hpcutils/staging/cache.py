"""The node's cache as a whole: where it is, what is in it, who uses it, what goes when room is needed."""

from __future__ import annotations

import contextlib
import getpass
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hpcutils import fs
from hpcutils.errors import SpecError
from hpcutils.log import LOGGER
from hpcutils.specs.site import load_site
from hpcutils.staging import store
from hpcutils.staging.owner import is_alive, is_mine, owner_in, this_process
from hpcutils.staging.plan import Kept
from hpcutils.staging.proof import trouble
from hpcutils.staging.store import KINDS, MARKER, PINS, Place

REASONS = {
    "complete": "not used for longest",
    "damaged": "its marker cannot be read",
    "left": "left by a job that was killed",
}


def cache_root(named: str | None = None) -> Path:
    """Return the node-local cache.

    Args:
        named: What a job or an option says; it wins over `$HPCUTILS_NODE_CACHE`, that over the site's `folders.node_local`, and
            that over a folder of the user's in `$SLURM_TMPDIR`, `$TMPDIR` or `/tmp`. In a folder that is not the user's own, a disk
            for all, one of theirs is taken.
    """
    own = Path(f"hpcutils-{getpass.getuser()}", "cache")
    named = named or os.environ.get("HPCUTILS_NODE_CACHE") or os.path.expandvars(load_site().folders.node_local or "")
    if not named:
        return Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()) / own
    folder = Path(named).absolute()
    return folder if not folder.exists() or folder.stat().st_uid == os.geteuid() else folder / own


def disk_of(root: Path) -> tuple[int, int, int | None]:
    """Return free bytes, bytes of a block and free inodes of the disk that holds, or will hold, `root`.

    btrfs and some network file systems make inodes as they need them, and tell of none: `None`.
    """
    while not root.exists():
        root = root.parent
    facts = os.statvfs(root)
    return facts.f_bavail * facts.f_frsize, facts.f_frsize, facts.f_favail if facts.f_files else None


def free_bytes(root: Path) -> int:
    """Return what is free on the disk that holds, or will hold, `root`."""
    return disk_of(root)[0]


# Pins. A job pins a dataset before it looks for the dataset's marker; who evicts takes the marker away before looking at the pins
# once more, and gives it back if there is one. Either the job finds no marker, or who evicts finds the pin: files that a job
# found are not touched, not even for a moment.


def pin(place: Place) -> Path:
    """Say that this process uses a dataset, as long as it lives; returns the pin's file."""
    folder = place.root / PINS
    folder.mkdir(parents=True, exist_ok=True)
    path = next(iter(_own_pins(place)), folder / f"{place.kind}.{place.key}.{this_process()}")
    path.touch()
    return path


def _own_pins(place: Place) -> list[Path]:
    prefix = f"{place.kind}.{place.key}."
    return [path for path in (place.root / PINS).glob(f"{prefix}*") if is_mine(path.name.removeprefix(prefix))]


def unpin(place: Place) -> None:
    """Take this process' pin away, if there is one."""
    for path in _own_pins(place):
        path.unlink()


def pins_of(place: Place) -> tuple[str, ...]:
    """Return who uses a dataset now, as `host-pid-start-job-…`; pins of dead processes are removed."""
    prefix, found = f"{place.kind}.{place.key}.", []
    with contextlib.suppress(FileNotFoundError), os.scandir(place.root / PINS) as entries:
        for entry in entries:
            owner = owner_in(entry.name.removeprefix(prefix)) if entry.name.startswith(prefix) else None
            if owner is None:
                continue
            with contextlib.suppress(FileNotFoundError):
                if is_alive(owner, entry.stat().st_mtime):
                    found.append(str(owner))
                else:
                    Path(entry.path).unlink(missing_ok=True)
    return tuple(sorted(found))


def is_used_by_others(place: Place) -> bool:
    """Say whether another process than this one uses a dataset now."""
    return any(not is_mine(owner) for owner in pins_of(place))


def kept_in(root: Path) -> list[Kept]:
    """Return the datasets of a cache that have a name, least recently used first."""
    kept = (_kept(place) for kind in KINDS for place in _places(root, kind))
    found = [each for each in kept if each is not None]
    return sorted(found, key=lambda kept: kept.used_s)


def _kept(place: Place) -> Kept | None:
    """Return a dataset; `None` when it has no marker: somebody removes it."""
    try:
        used_s = (place.entry / MARKER).lstat().st_mtime
    except OSError:
        return None
    head = store.read_head(place.entry)
    if head is None:
        return Kept(
            place.kind, place.key, place.key[:12], 0, store.taken_bytes(place.entry), used_s, pins_of(place), 0.0, "damaged"
        )
    rate = head.moved_bytes / head.seconds if head.seconds > 0 else 0.0
    return Kept(place.kind, place.key, head.name, head.files, head.size_bytes, used_s, pins_of(place), rate)


def begun_in(root: Path) -> list[Kept]:
    """Return what was begun and has no name: what killed jobs left, and what running ones (its pins) are at."""
    return [each for kind in KINDS for path in store.hidden(root, kind) if (each := _begun(kind, path)) is not None]


def _begun(kind: str, path: Path) -> Kept | None:
    key, mark, name = path.name[1:].partition(store.TRASH if store.TRASH in path.name else store.PART)
    owner = owner_in(name) if mark else None
    with contextlib.suppress(OSError):
        used_s = path.lstat().st_mtime
        if owner is not None:
            pins = (str(owner),) if is_alive(owner, used_s) else ()
            return Kept(kind, key, path.name, 0, store.taken_bytes(path), used_s, pins, 0.0, "growing" if pins else "left")
    return None


def touch(place: Place) -> None:
    """Take note that a dataset is used now."""
    with contextlib.suppress(OSError):
        os.utime(place.entry / MARKER)


def evict(place: Place) -> bool:
    """Remove a dataset, unless a running job pins it; says whether it went."""
    if pins_of(place):
        return False
    marker = place.entry / MARKER
    aside = place.entry / f"{MARKER}{store.TRASH}{this_process()}"
    with contextlib.suppress(FileNotFoundError):
        marker.rename(aside)
    if pins_of(place):
        with contextlib.suppress(FileNotFoundError):
            aside.rename(marker)
        return False
    return store.discard(place.entry, place)


def sweep(root: Path) -> int:
    """Remove trash, and datasets without a marker, that killed processes left; returns the number of folders removed.

    Partials stay: the next job that wants them takes them up.
    """
    count = 0
    for kind in KINDS:
        for left in store.leftovers(root, kind):
            if store.TRASH in left.name:
                fs.remove(left)
                count += 1
        count += sum(evict(place) for place in _places(root, kind) if not (place.entry / MARKER).exists())
    sweep_pins(root)
    return count


def sweep_pins(root: Path) -> None:
    """Remove the pins of processes that are dead."""
    with contextlib.suppress(FileNotFoundError), os.scandir(root / PINS) as entries:
        for entry in entries:
            # kind.key.owner: only the owner may hold further dots.
            owner = owner_in(entry.name.split(".", 2)[-1])
            with contextlib.suppress(FileNotFoundError):
                if owner is not None and not is_alive(owner, entry.stat().st_mtime):
                    Path(entry.path).unlink()


def _places(root: Path, kind: str) -> list[Place]:
    with contextlib.suppress(FileNotFoundError):
        return [Place(root, kind, entry.name) for entry in sorted((root / kind).iterdir()) if not entry.name.startswith(".")]
    return []


def make_room(root: Path, which: Iterable[Kept]) -> None:
    """Evict what a plan says; what was pinned since it was made stays."""
    for kept in which:
        if remove(root, kept):
            LOGGER.info("evicted %s (%d bytes): %s", kept.name, kept.size_bytes, REASONS[kept.state])


def remove(root: Path, kept: Kept) -> bool:
    """Remove what takes room, unless a job that runs uses it or is at it; says whether it went."""
    place = Place(root, kept.kind, kept.key)
    if kept.state in ("complete", "damaged"):
        return evict(place)
    # Who claims it at this moment has renamed it: it is not there then.
    return kept.state == "left" and store.discard(root / kept.kind / kept.name, place)


@dataclass(frozen=True)
class Verified:
    """What re-hashing a dataset found.

    Args:
        kept: The dataset.
        wrong: Files with a segment that does not prove right, or that are missing.
    """

    kept: Kept
    wrong: tuple[str, ...]


def verify(root: Path, kept: Kept) -> Verified:
    """Hash every segment of a complete dataset again."""
    return Verified(kept, tuple(trouble(Place(root, kept.kind, kept.key))))


def choose(root: Path, names: Iterable[str], *, begun: bool = False) -> list[Kept]:
    """Return the datasets that are called so: by name, key or the beginning of one; all without names.

    Args:
        root: The cache.
        names: What is asked for.
        begun: Return what has no name yet too.

    Raises:
        SpecError: There is none of a name.
    """
    kept, names = kept_in(root) + (begun_in(root) if begun else []), list(names)
    for name in names:
        if not any(_is_called(each, name) for each in kept):
            raise SpecError(f"no dataset {name!r} in {root}", f"there are: {', '.join(each.name for each in kept) or 'none'}")
    return [each for each in kept if not names or any(_is_called(each, name) for name in names)]


def _is_called(kept: Kept, name: str) -> bool:
    return bool(name) and (kept.name == name or kept.key.startswith(name))


def evict_all(root: Path, which: Iterable[Kept]) -> tuple[list[Kept], list[Kept]]:
    """Remove what takes room; returns what went, and what is in use."""
    gone: list[Kept] = []
    stay: list[Kept] = []
    for kept in which:
        (gone if remove(root, kept) else stay).append(kept)
    sweep(root)
    return gone, stay


def size(root: Path) -> dict[str, int]:
    """Return what a cache takes, in numbers and bytes."""
    kept, left = kept_in(root), [each for each in begun_in(root) if each.state == "left"]
    return {
        "datasets": len(kept),
        "size_bytes": sum(each.size_bytes for each in kept),
        "damaged": sum(each.state == "damaged" for each in kept),
        "left": len(left),
        "left_bytes": sum(each.size_bytes for each in left),
        "free_bytes": free_bytes(root),
    }
