"""The cache on a node's own disk: datasets that appear whole, partials that can be taken up, markers that prove both.

    ROOT/manifest/KEY/  ROOT/sha256/KEY/  ROOT/stat/KEY/        complete datasets; ROOT/unpacked/KEY/: what an archive holds
        files/…             the files
        segments            a line a segment that was proved: its number and digest
        manifest.jsonl      what must be in `files`
        complete.jsonl      written last: every file's size and time; its own time is that of the last use
    ROOT/KIND/.KEY.part-OWNER/                                  a dataset that is being made, or was when its maker was killed
    ROOT/KIND/.KEY.trash-OWNER/                                 one that is being removed
    ROOT/pins/KIND.KEY.OWNER                                    a job that uses it

Nothing is right because of a lock. A folder gets its name by one rename, when all that is in it is on the disk. A partial is
claimed by renaming it: two cannot both succeed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hpcutils import fs
from hpcutils.errors import IntegrityError
from hpcutils.log import LOGGER
from hpcutils.staging.archive import flush
from hpcutils.staging.owner import is_alive, is_mine, owner_in, this_process
from hpcutils.staging.swap import swap

FILES, SEGMENTS, LIST, MARKER = "files", "segments", "manifest.jsonl", "complete.jsonl"
KINDS = ("manifest", "sha256", "stat", "unpacked")
PART, TRASH = ".part-", ".trash-"
PINS = "pins"
LOOKS, LOOK_AGAIN_S = 3, 0.02
# Up to so many files are flushed one by one; more, with the whole file system in one call.
FLUSH_EACH = 64
# A sidecar of this size or more lists at least one segment.
LONGEST_FIRST_LINE = 32
TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST})


@dataclass(frozen=True)
class Head:
    """The first line of a marker.

    Args:
        name: What the dataset is called.
        files: Number of its files.
        size_bytes: Bytes of all of them.
        digest: sha256 of the manifest, or of the one file.
        moved_bytes: Bytes that were moved to make it.
        seconds: How long that took.
    """

    name: str
    files: int
    size_bytes: int
    digest: str
    moved_bytes: int
    seconds: float


@dataclass(frozen=True)
class Place:
    """Where a dataset is, or will be.

    Args:
        root: The cache.
        kind: See `Dataset`.
        key: See `Dataset`.
    """

    root: Path
    kind: str
    key: str

    @property
    def entry(self) -> Path:
        """Its folder, once it is complete."""
        return self.root / self.kind / self.key

    @property
    def files(self) -> Path:
        """The folder of its files, once it is complete."""
        return self.entry / FILES

    def temporary(self, mark: str = PART) -> Path:
        """Return an unused name on the same file system that tells whose it is."""
        return self.root / self.kind / f".{self.key}{mark}{this_process()}"

    def partials(self) -> list[Path]:
        """Return what killed processes left of it, the largest beginning first."""
        left = [path for path in leftovers(self.root, self.kind) if path.name.startswith(f".{self.key}{PART}")]
        return sorted(left, key=_finished_bytes, reverse=True)


def leftovers(root: Path, kind: str) -> list[Path]:
    """Return partials and trash of `kind` whose maker does not run any more."""
    with contextlib.suppress(FileNotFoundError), os.scandir(root / kind) as found:
        return [Path(entry.path) for entry in found if entry.name.startswith(".") and _is_left(entry)]
    return []


def _is_left(entry: os.DirEntry[str]) -> bool:
    mark = TRASH if TRASH in entry.name else PART
    owner = owner_in(entry.name.rpartition(mark)[2])
    with contextlib.suppress(FileNotFoundError):
        return owner is not None and not is_alive(owner, entry.stat(follow_symlinks=False).st_mtime)
    return False


def _finished_bytes(partial: Path) -> int:
    with contextlib.suppress(OSError):
        return (partial / SEGMENTS).stat().st_size
    return 0


def read_head(entry: Path) -> Head | None:
    """Return what a complete dataset's marker says first; `None` where there is none that can be read."""
    try:
        with open(entry / MARKER, encoding="ascii", opener=fs.plain) as stream:
            return Head(**json.loads(stream.readline()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def is_intact(entry: Path) -> bool:
    """Say whether every file has the size and time that the marker tells, and none is missing or too many.

    A marker that is not there may be back in a moment: somebody who evicts took it away to look at the pins.
    """
    for _ in range(LOOKS):
        if (entry / MARKER).exists() or not entry.is_dir():
            break
        time.sleep(LOOK_AGAIN_S)
    try:
        with open(entry / MARKER, encoding="ascii", opener=fs.plain) as stream:
            stream.readline()
            for folders, line in enumerate(stream):
                inside, facts = json.loads(line)
                if inside is None:
                    return bool(facts == folders)
                if _facts(entry / FILES / inside) != facts:
                    return False
    except (OSError, ValueError, TypeError, RecursionError):
        return False
    return False


def _facts(folder: Path) -> dict[str, list[int] | None]:
    """Return size and time of each file of a folder (a link has the size -1), and `None` for each folder in it."""
    found: dict[str, list[int] | None] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            facts = entry.stat(follow_symlinks=False)
            size = facts.st_size if stat.S_ISREG(facts.st_mode) else -1
            found[entry.name] = None if stat.S_ISDIR(facts.st_mode) else [size, facts.st_mtime_ns]
    return found


def marker_lines(files: Path, head: Head) -> Iterator[str]:
    """Yield the marker's lines.

    Raises:
        IntegrityError: The number of files is another one than the manifest lists.
    """
    yield json.dumps(asdict(head)) + "\n"
    count, waiting, folders = 0, [""], 0
    while waiting:
        inside = waiting.pop()
        facts = _facts(files / inside)
        below = [name for name, value in facts.items() if value is None]
        waiting += [f"{inside}/{name}" if inside else name for name in below]
        count, folders = count + len(facts) - len(below), folders + 1
        yield json.dumps([inside, facts]) + "\n"
    if count != head.files:
        raise IntegrityError(
            f"{head.name}: {count} files came of {head.files}",
            "the manifest lists a file twice, or the cache was changed meanwhile",
        )
    yield json.dumps([None, folders]) + "\n"


def complete(partial: Path, place: Place, head: Head, wrong: int | None = None) -> None:
    """Give a partial that has all its bytes its name: flushed, with its marker, by one rename.

    Args:
        partial: The folder.
        place: Where it goes. What is there already stays if it is as good, and is replaced at once if not.
        head: The marker's first line.
        wrong: The inode of a folder that has the name and is to be replaced, whatever its marker says.

    Raises:
        IntegrityError: It has other files than it should.
        OSError: The disk refuses.
    """
    _flush(partial, head.files)
    with fs.publishing(partial / MARKER) as temporary, temporary.open("w", encoding="ascii") as stream:
        stream.writelines(marker_lines(partial / FILES, head))
    while not _named(partial, place, wrong):
        pass
    fs.fsync_path(place.entry.parent)


def _named(partial: Path, place: Place, wrong: int | None) -> bool:
    """Give `partial` its name; says whether that is done, or another process was faster and we must look again."""
    try:
        partial.rename(place.entry)
        return True
    except OSError as exc:
        if exc.errno not in TAKEN:
            raise
    if inode_of(place.entry) != wrong and is_intact(place.entry):
        # Another process was faster: its files are as good.
        discard(partial, place)
        return True
    try:
        old = swap(partial, place.entry, place.temporary(TRASH))
    except OSError as exc:
        if exc.errno not in TAKEN:
            raise
        return False
    if old is not None:
        discard(old, place)
    return True


def inode_of(folder: Path) -> int | None:
    """Return which folder has a name now; `None` for none."""
    with contextlib.suppress(OSError):
        return folder.stat().st_ino
    return None


def _flush(folder: Path, files: int) -> None:
    if files > FLUSH_EACH:
        flush(folder)
        return
    for inside, _, names in os.walk(folder):
        for name in names:
            fs.fsync_path(Path(inside, name))
        fs.fsync_path(Path(inside))


def new_partial(place: Place) -> Path:
    """Make an empty partial."""
    partial = place.temporary()
    (partial / FILES).mkdir(parents=True)
    return partial


def claim(place: Place) -> Path:
    """Return a partial to fill: one that a killed process left, now under this process' name, or a new one.

    Further ones that were left are removed.
    """
    claimed = None
    for left in place.partials():
        mine = place.temporary()
        with contextlib.suppress(FileNotFoundError):
            left.rename(mine)
            if claimed is None and (mine / FILES).is_dir():
                LOGGER.info("taking up what a killed job left: %s", left.name)
                claimed = mine
            else:
                fs.remove(mine)
    if claimed is None:
        return new_partial(place)
    _strip(claimed)
    return claimed


def _strip(partial: Path) -> None:
    """Remove all but the files and the sidecar: markers and temporaries of who had it before."""
    for path in partial.iterdir():
        if path.name not in (FILES, SEGMENTS):
            fs.remove(path)


def put_aside(place: Place) -> Path | None:
    """Take a complete dataset that is not what it must be out of its name; what is right of it can be taken up.

    Returns:
        The partial that it became; `None` when it is gone already.
    """
    partial = place.temporary()
    try:
        place.entry.rename(partial)
    except FileNotFoundError:
        return None
    _strip(partial)
    return partial


def prune(partial: Path, names: Iterable[str]) -> None:
    """Remove what is in a partial's files and is no file of `names`: links, pipes, other files, and folders that are empty then."""
    files = partial / FILES
    if not any(files.iterdir()):
        return
    # 64 bits a name: two that meet by chance leave a file too many, which is found when it is counted.
    wanted = {hash(name) for name in names}
    for inside, folders, found in os.walk(files, topdown=False):
        here = Path(inside)
        # Folders that were emptied below are gone.
        for path in (here / name for name in (*found, *folders) if os.path.lexists(here / name)):
            mode = path.lstat().st_mode
            if not (stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and hash(str(path.relative_to(files))) in wanted)):
                path.unlink()
        if here != files and not any(here.iterdir()):
            here.rmdir()


def discard(folder: Path, place: Place) -> bool:
    """Remove a folder: its name goes at once, its content after; says whether it was there."""
    trash = place.temporary(TRASH)
    try:
        folder.rename(trash)
    except FileNotFoundError:
        return False
    fs.remove(trash)
    return True


def drop_partials(place: Place) -> None:
    """Remove what killed processes left of a dataset that is here now."""
    for left in place.partials():
        discard(left, place)


def give_up(place: Place) -> None:
    """Give up what this process has of a dataset that it could not complete: the next job may claim it, also one in this process.

    A partial without a proved segment is removed. What the disk refuses now is left for the next job.
    """
    for partial in hidden(place.root, place.kind):
        mark = TRASH if TRASH in partial.name else PART
        head, _, owner = partial.name.rpartition(mark)
        if head != f".{place.key}" or not is_mine(owner):
            continue
        with contextlib.suppress(OSError):
            if mark == TRASH or _finished_bytes(partial) < LONGEST_FIRST_LINE:
                fs.remove(partial)
            else:
                # No process has the number 0.
                partial.rename(partial.with_name(f"{head}{PART}{replace(this_process(), pid=0, start_ticks=0)}"))


def hidden(root: Path, kind: str) -> list[Path]:
    """Return what was begun, or is being removed, whoever does it."""
    with contextlib.suppress(OSError):
        return [path for path in (root / kind).iterdir() if path.name.startswith(".")]
    return []


def taken_bytes(folder: Path) -> int:
    """Return what a dataset without a readable marker takes: what its sidecar lists, or else what is there."""
    with contextlib.suppress(OSError, ValueError), open(folder / SEGMENTS, "rb", opener=fs.plain) as stream:
        segment_bytes = int(stream.readline())
        return segment_bytes * sum(1 for _ in stream)
    blocks = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                blocks += Path(inside, name).lstat().st_blocks
    return blocks * 512


def write_finished(folder: Path, segment_bytes: int, finished: dict[int, str]) -> None:
    """Begin a sidecar with the segments that were proved now."""
    lines = [f"{segment_bytes}\n", *(f"{number} {digest}\n" for number, digest in finished.items())]
    (folder / SEGMENTS).write_text("".join(lines), encoding="ascii")


def read_finished(folder: Path, segment_bytes: int) -> dict[int, str]:
    """Return the segments that a sidecar lists as proved, by number; a line that was cut off counts as none."""
    found: dict[int, str] = {}
    try:
        with open(folder / SEGMENTS, encoding="ascii", errors="replace", opener=fs.plain) as stream:
            lines = stream.read().splitlines()
    except OSError:
        return found
    if not lines or lines[0] != str(segment_bytes):
        return found
    for line in lines[1:]:
        number, _, digest = line.partition(" ")
        if number.isdigit() and len(digest) == 32:
            found[int(number)] = digest
    return found
