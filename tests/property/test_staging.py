"""Segments and rounds for any dataset and any nodes."""

import io
import logging
import os
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcutils.staging.cache import trouble
from hpcutils.staging.find import Found, find_files
from hpcutils.staging.items import Settings
from hpcutils.staging.leaders import Leaders
from hpcutils.staging.manifest import write_manifest
from hpcutils.staging.ring import plan_rounds, rounds_of
from hpcutils.staging.segments import Segment, cut
from hpcutils.staging.stage import stage_manifest
from hpcutils.staging.store import Place

SIZES = st.lists(st.integers(0, 40), max_size=12)


@given(SIZES, st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_segments_are_the_files_one_behind_the_other(sizes, segment_bytes):
    with tempfile.TemporaryDirectory() as folder:
        bodies = {f"f{number}": bytes([number % 251]) * size for number, size in enumerate(sizes)}
        for name, body in bodies.items():
            Path(folder, name).write_bytes(body)
        manifest = write_manifest([Found(name, Path(folder, name)) for name in bodies], Path(folder, "m"), segment_bytes)
        segments = list(cut(manifest.entries(), segment_bytes, manifest.total.tail))
    whole, made = b"".join(bodies.values()), {name: bytearray(len(body)) for name, body in bodies.items()}
    assert [segment.number for segment in segments] == list(range(manifest.segments))
    assert {piece.path for segment in segments for piece in segment.pieces} == set(bodies)
    for segment in segments:
        start = segment.number * segment_bytes
        data = whole[start : start + segment.size_bytes]
        assert segment.digest == xxhash.xxh3_128_hexdigest(data)
        assert sum(piece.size_bytes for piece in segment.pieces) == segment.size_bytes == len(data)
        for piece in segment.pieces:
            made[piece.path][piece.offset : piece.offset + piece.size_bytes] = data[piece.at : piece.at + piece.size_bytes]
    assert {name: bytes(body) for name, body in made.items()} == bodies


@given(st.data(), st.integers(0, 30), st.integers(1, 6), st.booleans())
@settings(max_examples=100, deadline=None)
def test_each_segment_that_somebody_lacks_goes_round_once(data, count, nodes, divisible):
    some = st.none() | st.frozensets(st.integers(0, max(count - 1, 0)))
    haves = data.draw(st.lists(some, min_size=nodes, max_size=nodes))
    rounds = plan_rounds(count, haves, divisible=divisible)
    moved = [number for numbers in rounds for number in numbers if number is not None]
    has = [set(range(count)) if have is None else have for have in haves]
    assert sorted(moved) == [number for number in range(count) if any(number not in have for have in has)]
    for numbers in rounds:
        assert len(numbers) == nodes
        for rank, number in enumerate(numbers):
            if number is not None:
                holders = [other for other in range(nodes) if number in has[other]]
                assert rank in holders if holders else (divisible or rank == 0)
    stream = (Segment(number, 0, None, ()) for number in range(count))
    found = [[slot and slot.number for slot in slots] for slots in rounds_of(rounds, stream, frozenset(moved))]
    assert found == [list(numbers) for numbers in rounds]


@given(st.integers(1, 200), st.integers(1, 16))
def test_nobody_reads_more_than_one_segment_more_than_another(count, nodes):
    rounds = plan_rounds(count, [frozenset()] * nodes)
    shares = [sum(numbers[rank] is not None for numbers in rounds) for rank in range(nodes)]
    assert max(shares) - min(shares) <= 1


def damage(path: Path, how: str, where: float) -> None:
    """Change a file as a broken disk does: its time stays."""
    facts = path.stat()
    body = bytearray(path.read_bytes())
    at = int(where * len(body))
    if how == "remove":
        path.unlink()
        return
    if how == "flip" and body:
        body[at] ^= 0x10
    elif how == "cut off":
        del body[at:]
    elif how == "more":
        body[at:at] = b"\0more"
    path.write_bytes(body)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


DAMAGE = st.tuples(st.floats(0, 0.999), st.sampled_from(["remove", "flip", "cut off", "more"]), st.floats(0, 0.999))


@given(st.lists(DAMAGE, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_whatever_happens_to_a_cache_is_found_and_mended(damages):
    logging.disable()
    with tempfile.TemporaryDirectory() as name, redirect_stderr(io.StringIO()):
        folder = Path(name)
        source = folder / "source"
        (source / "below").mkdir(parents=True)
        for number in range(6):
            (source / "below" / f"{number}").write_bytes(bytes([number]) * (700 * number))
        manifest = write_manifest(find_files([source]), folder / "m.jsonl", 4096).path
        wanted = {path.name: path.read_bytes() for path in source.rglob("*") if path.is_file()}
        entry = stage_manifest(manifest, str(source), Settings(folder / "cache"), Leaders()).files.parent
        place = Place(folder / "cache", "manifest", entry.name)
        for which, how, where in damages:
            files = sorted(path for path in entry.rglob("*") if path.is_file())
            damage(files[int(which * len(files))], how, where)
        files = stage_manifest(manifest, str(source), Settings(folder / "cache", verify=True), Leaders()).files
        assert {path.name: path.read_bytes() for path in files.rglob("*") if path.is_file()} == wanted
        assert trouble(place) == []
        assert list((folder / "cache").rglob(".*")) == []
    logging.disable(logging.NOTSET)
