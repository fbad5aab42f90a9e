"""`hpcutils cache`: the datasets on this node's own disk."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from hpcutils.cli.options import JSON, emit
from hpcutils.cli.stage import CACHE

if TYPE_CHECKING:
    from hpcutils.staging.plan import Kept

NAMES = click.argument("names", metavar="[NAME|KEY]...", nargs=-1)


@click.group()
def cache() -> None:
    """Look after the cache on this node's disk."""


@cache.command("list")
@CACHE
@JSON
def list_(root: str | None, as_json: bool) -> None:
    """Print the datasets, least recently used first, and what jobs began; what killed jobs left, or is damaged, goes first."""
    from hpcutils.staging import cache as room

    folder = room.cache_root(root)
    kept = room.kept_in(folder) + room.begun_in(folder)
    emit({"datasets": [asdict(each) for each in kept]}, as_json, "\n".join(map(_line, kept)) or "nothing")


def _line(kept: Kept) -> str:
    import time

    from hpcutils.staging.plan import shown_bytes

    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.used_s))
    pins = f"  in use by {len(kept.pins)}" if kept.pins and kept.state != "growing" else ""
    files = f"{kept.files:>9,} files" if kept.state == "complete" else f"{kept.state:>15}"
    name = "" if kept.state != "complete" else f"  {kept.name}"
    return f"{kept.key[:12]}  {shown_bytes(kept.size_bytes):>10}  {files}  used {used}{name}{pins}"


@cache.command()
@NAMES
@CACHE
@JSON
def verify(names: tuple[str, ...], root: str | None, as_json: bool) -> None:
    """Hash the datasets again, all of them unless some are named; exit code 6 when one is not what it was."""
    from hpcutils.errors import IntegrityError
    from hpcutils.staging import cache as room

    folder = room.cache_root(root)
    found = [room.verify(folder, kept) for kept in room.choose(folder, names)]
    lines = [f"{each.kept.key[:12]}  {each.kept.name}: {', '.join(each.wrong[:10]) or 'as it was'}" for each in found]
    facts = [{"key": each.kept.key, "name": each.kept.name, "wrong": each.wrong} for each in found]
    emit({"datasets": facts}, as_json, "\n".join(lines) or "nothing")
    wrong = [each.kept.name for each in found if each.wrong]
    if wrong:
        raise IntegrityError(f"changed since they came: {', '.join(wrong)}", "the next job that uses them mends them")


@cache.command()
@NAMES
@click.option("--all", "everything", is_flag=True, help="All datasets, and what killed jobs left.")
@CACHE
@JSON
def evict(names: tuple[str, ...], everything: bool, root: str | None, as_json: bool) -> None:
    """Remove datasets; never one that a running job uses."""
    from hpcutils.errors import SpecError
    from hpcutils.staging import cache as room

    if bool(names) == everything:
        raise SpecError("say which datasets, or --all", "hpcutils cache list")
    folder = room.cache_root(root)
    gone, stay = room.evict_all(folder, room.choose(folder, names, begun=True))
    lines = [f"removed {kept.name}" for kept in gone] + [f"in use, kept: {kept.name}" for kept in stay]
    facts = {"removed": [kept.key for kept in gone], "in_use": [kept.key for kept in stay]}
    emit(facts, as_json, "\n".join(lines) or "nothing")


@cache.command()
@CACHE
@JSON
def size(root: str | None, as_json: bool) -> None:
    """Print what the datasets take, what killed jobs left, and what is free."""
    from hpcutils.staging import cache as room
    from hpcutils.staging.plan import shown_bytes

    facts = room.size(room.cache_root(root))
    text = f"{facts['datasets']} datasets, {shown_bytes(facts['size_bytes'])}; {facts['damaged']} damaged"
    text += f"; {facts['left']} left by killed jobs, {shown_bytes(facts['left_bytes'])}"
    emit(facts, as_json, f"{text}; {shown_bytes(facts['free_bytes'])} free")
