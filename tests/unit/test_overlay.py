"""Reading a file while it arrives: from the disk what has landed, from its source what has not."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import h5py
import numpy as np
import pytest
from servers import answers, honest, ignores_range, serving

from hpcutils.data import arriving
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.errors import DataError, IntegrityError
from hpcutils.staging import store
from hpcutils.staging.dataset import Dataset
from hpcutils.staging.landing import Landing
from hpcutils.staging.load import Load, Pool, digest_of
from hpcutils.staging.manifest import Entry
from hpcutils.staging.origins import FolderOrigin
from hpcutils.staging.overlay import BLOCK_BYTES, Arriving, Overlay, can_be_read_through
from hpcutils.staging.store import FILES, Head, Place

SEGMENT = 1 << 16


class Node:
    """A partial that a test fills segment by segment. What has not landed is there as wrong bytes."""

    def __init__(self, folder: Path, body: bytes, base: str | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.body, self.source = body, folder / "source.h5"
        self.source.write_bytes(body)
        self.dataset = Dataset("x.h5", "sha256", "0" * 64, SEGMENT, entry=Entry("x.h5", len(body), None))
        self.place = Place(folder / "cache", "sha256", "0" * 64)
        self.partial = store.new_partial(self.place)
        store.write_finished(self.partial, SEGMENT, {})
        (self.partial / FILES / "x.h5").write_bytes(bytes(byte ^ 0xFF for byte in body))
        self.file = Arriving("x.h5", len(body), 0, SEGMENT, self.partial, self.place.entry, base or str(self.source), True)
        self.landing = Landing(self.partial)
        self.pool = Pool(2, SEGMENT)

    @property
    def path(self) -> Path:
        """Where the file will be."""
        return self.place.files / "x.h5"

    def land(self, *numbers: int) -> None:
        before = self.landing.landed_bytes
        landed = 0
        for segment in self.dataset.segments():
            if segment.number in numbers:
                buffer = self.pool.take()
                (piece,) = segment.pieces
                buffer.memory[: segment.size_bytes] = self.body[piece.offset : piece.offset + piece.size_bytes]
                self.landing.land(Load(segment, digest_of(buffer.memory[: segment.size_bytes]), buffer))
                buffer.drop()
                landed += segment.size_bytes
        while self.landing.landed_bytes < before + landed:
            assert self.landing.error is None
            time.sleep(0.0005)

    def publish(self) -> None:
        self.land(*range(self.dataset.segment_count))
        self.landing.__exit__(None, None, None)
        store.complete(self.partial, self.place, Head("x.h5", 1, len(self.body), "0" * 64, len(self.body), 1.0))


class Counted(FolderOrigin):
    """Counts what is read of a source; may be lost."""

    def __init__(self, path: Path) -> None:
        super().__init__(lambda name: path)
        self.reads: list[tuple[int, int]] = []
        self.is_lost = False

    def read(self, piece, buffer):
        if self.is_lost:
            raise DataError("the source was lost")
        self.reads.append((piece.offset, len(buffer)))
        super().read(piece, buffer)


def read(overlay: Overlay, offset: int, size: int) -> bytes:
    buffer = bytearray(size)
    overlay.read_into(offset, memoryview(buffer))
    return bytes(buffer)


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path, os.urandom(9 * SEGMENT + 1234))


def test_what_has_landed_comes_from_the_disk_and_only_that(node):
    overlay = Overlay(node.file, origin := Counted(node.source))
    assert read(overlay, 0, len(node.body)) == node.body
    assert sum(size for _, size in origin.reads) == overlay.read_through_bytes == len(node.body)
    node.land(2, 9)
    origin.reads.clear()
    assert read(overlay, 0, len(node.body)) == node.body
    assert not [offset for offset, _ in origin.reads if offset // SEGMENT in (2, 9)]
    assert sum(size for _, size in origin.reads) == len(node.body) - SEGMENT - 1234
    # Across a border: one part from the disk, the other from the source.
    origin.reads.clear()
    assert read(overlay, 3 * SEGMENT - 10_000, 20_000) == node.body[3 * SEGMENT - 10_000 :][:20_000]
    assert origin.reads == [(3 * SEGMENT, 10_000)]


def test_a_local_byte_is_used_when_its_segment_is_noted_and_not_before(node):
    overlay = Overlay(node.file, Counted(node.source))
    # The bytes are written, the line is not whole: as a leader that is killed here leaves it.
    with (node.partial / FILES / "x.h5").open("r+b") as stream:
        stream.write(node.body[:SEGMENT])
    with (node.partial / "segments").open("a") as sidecar:
        sidecar.write("0 0123456789")
        sidecar.flush()
        before = overlay.read_through_bytes
        assert read(overlay, 0, SEGMENT) == node.body[:SEGMENT]
        assert overlay.read_through_bytes == before + SEGMENT
        sidecar.write("0" * 22 + "\n")
        sidecar.flush()
        assert read(overlay, 0, SEGMENT) == node.body[:SEGMENT]
        assert overlay.read_through_bytes == before + SEGMENT


def test_segments_arrive_in_any_order_while_threads_read(node):
    overlay, wrong = Overlay(node.file, Counted(node.source)), []
    published = threading.Event()

    def reads(seed: int) -> None:
        dice, again = random.Random(seed), True
        while again:
            again = not published.is_set()
            offset = dice.randrange(len(node.body))
            size = dice.randrange(min(3 * SEGMENT, len(node.body) - offset) + 1)
            if read(overlay, offset, size) != node.body[offset : offset + size]:
                wrong.append((offset, size))

    threads = [threading.Thread(target=reads, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    order = list(range(10))
    random.Random(5).shuffle(order)
    for number in order:
        node.land(number)
    node.publish()
    published.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    # It was opened before the folder got its name, and reads the same file after.
    through = overlay.read_through_bytes
    assert read(overlay, 0, len(node.body)) == node.body
    assert overlay.read_through_bytes == through
    overlay.prove()


def test_a_dataset_that_was_published_before_it_was_opened(node):
    node.publish()
    overlay = Overlay(node.file, origin := Counted(node.source))
    assert read(overlay, 5, 3 * SEGMENT) == node.body[5 : 5 + 3 * SEGMENT]
    assert origin.reads == []


def test_a_dataset_that_another_process_published_in_other_segments(node):
    overlay = Overlay(node.file, Counted(node.source))
    node.publish()
    text = (node.place.entry / "segments").read_text().splitlines()
    (node.place.entry / "segments").write_text("\n".join(["4096", *text[1:]]) + "\n")
    for _ in range(2):
        assert read(overlay, 0, len(node.body)) == node.body
    # The last 1,234 bytes are a small read, and kept.
    assert overlay.read_through_bytes == 2 * len(node.body) - 1234


def test_a_file_in_the_middle_of_a_dataset(tmp_path):
    node = Node(tmp_path, body := os.urandom(3 * SEGMENT))
    # Segment 1 of the dataset holds the file's bytes from 40,000 to 40,000 + SEGMENT.
    file = Arriving("x.h5", len(body), SEGMENT - 40_000, SEGMENT, node.partial, node.place.entry, str(node.source), True)
    overlay = Overlay(file, origin := Counted(node.source))
    (node.partial / FILES / "x.h5").write_bytes(body)
    with (node.partial / "segments").open("a") as sidecar:
        sidecar.write(f"1 {'0' * 32}\n")
    assert read(overlay, 0, len(body)) == body
    assert origin.reads == [(0, 40_000), (40_000 + SEGMENT, SEGMENT), (40_000 + 2 * SEGMENT, SEGMENT - 40_000)]


def test_small_reads_bring_the_block_around_them_once(node):
    overlay = Overlay(node.file, origin := Counted(node.source))
    for offset in range(0, SEGMENT - 12, 500):
        assert read(overlay, offset, 12) == node.body[offset : offset + 12]
    assert read(overlay, len(node.body) - 7, 7) == node.body[-7:]
    assert origin.reads == [*((place, BLOCK_BYTES) for place in range(0, SEGMENT, BLOCK_BYTES)), (9 * SEGMENT, 1234)]


def test_a_source_that_was_another_while_it_was_read_is_found_out(node):
    overlay = Overlay(node.file, Counted(node.source))
    read(overlay, 10, 8000)
    good = node.source.read_bytes()
    node.source.write_bytes(good[:200_000] + b"\0\1\2\3" + good[200_004:])
    assert read(overlay, 190_000, 20_000) != node.body[190_000:210_000]
    node.publish()
    with pytest.raises(IntegrityError, match="bytes from byte 196608 on were others when training read them"):
        overlay.prove()


@pytest.mark.parametrize("quirk, ranges", [(honest, True), (ignores_range(), False)])
def test_a_web_server_is_asked_for_ranges(tmp_path, quirk, ranges):
    body = os.urandom(4 * SEGMENT)
    with serving() as site:
        site.repeat_last = True
        node = Node(tmp_path, body, site.put("/x.h5", body, quirk))
        assert can_be_read_through(node.file) is ranges
        if not ranges:
            return
        overlay = Overlay(node.file)
        node.land(0)
        site.seen.clear()
        # One behind the other, and back again.
        for offset in (0, SEGMENT, SEGMENT + 5000, SEGMENT + 10_000, SEGMENT, 3 * SEGMENT):
            assert read(overlay, offset, 5000) == body[offset : offset + 5000]
        asked = [asked for asked in site.ranges() if asked]
    assert asked == [f"bytes={first}-{first + 4999}" for first in (65536, 70536, 75536, 65536, 196608)]
    assert overlay.read_through_bytes == 25_000


def test_what_fsspec_opens_is_read_through_and_proved(tmp_path):
    body = os.urandom(4 * SEGMENT)
    memory = fsspec.filesystem("memory")
    memory.pipe("/overlay/x.h5", body)
    node = Node(tmp_path, body, "memory://overlay/x.h5")
    assert can_be_read_through(node.file)
    overlay = Overlay(node.file)
    node.land(1)
    for offset in (3 * SEGMENT + 17, 0, SEGMENT - 100, 2 * SEGMENT):
        assert read(overlay, offset, 5000) == body[offset : offset + 5000]
    assert 15_100 <= overlay.read_through_bytes <= 4 * BLOCK_BYTES
    place = 3 * SEGMENT + 40_000
    memory.pipe("/overlay/x.h5", body[::-1])
    late = Overlay(node.file)
    assert read(late, place, BLOCK_BYTES) == body[::-1][place : place + BLOCK_BYTES]
    node.publish()
    overlay.prove()
    with pytest.raises(IntegrityError, match=f"bytes from byte {place} on were others when training read them"):
        late.prove()
    memory.rm("/overlay/x.h5")
    with pytest.raises(DataError, match=r"memory://overlay/x\.h5"):
        read(Overlay(Node(tmp_path / "again", body, "memory://overlay/x.h5").file), 0, 100)


def test_a_server_that_goes_away_is_an_error_that_names_it(tmp_path):
    body = os.urandom(2 * SEGMENT)
    with serving() as site:
        site.repeat_last = True
        node = Node(tmp_path, body, site.put("/x.h5", body, answers(404)))
        with pytest.raises(DataError, match=r"/x\.h5: the server answered 404"):
            read(Overlay(node.file), 0, 9000)


# HDF5 over such a file.


def make_h5(path: Path, userblock: int = 0) -> None:
    dice = np.random.default_rng(3)
    rows = dice.integers(0, 1000, (900, 6, 5)).astype("i4")
    with h5py.File(path, "w", userblock_size=userblock) as file:
        file.create_dataset("gzip", data=rows, chunks=(7, 6, 3), compression="gzip", shuffle=True)
        file.create_dataset("plain chunks", data=rows.astype("f4"), chunks=(16, 6, 5))
        file["block"] = rows.astype("u2")
        file.create_dataset("other filter", data=rows, chunks=(10, 6, 5), compression="lzf", fletcher32=True)
        file["text"] = [f"row {number}" for number in range(900)]
        sparse = file.create_dataset("sparse", (900, 4), "f8", chunks=(10, 4), fillvalue=2.5)
        sparse[100:120] = 1
        layout = h5py.VirtualLayout((900, 6, 5), "i4")
        layout[:] = h5py.VirtualSource(file["gzip"])
        file.create_virtual_dataset("view", layout)
        file["outside"] = h5py.ExternalLink("elsewhere.h5", "/x")


NAMES = ["gzip", "plain chunks", "block", "other filter", "text", "sparse", "view"]


@pytest.fixture(params=[0, 512], ids=["", "user block"])
def file_node(tmp_path, request):
    make_h5(tmp_path / "made.h5", request.param)
    return Node(tmp_path, (tmp_path / "made.h5").read_bytes())


@pytest.mark.parametrize("name", NAMES)
def test_every_reader_reads_a_file_that_arrives(file_node, tmp_path, name):
    node, origin = file_node, Counted(file_node.source)
    dice = np.random.default_rng(0)
    with HDF5Matrix(tmp_path / "made.h5", name) as here, HDF5Matrix.arriving(Overlay(node.file, origin), node.path, name) as there:
        assert (there.shape, there.dtype, there.chunks) == (here.shape, here.dtype, here.chunks)
        for number in dice.permutation(node.dataset.segment_count):
            np.testing.assert_array_equal(there[100:450], here[100:450])
            rows = dice.integers(0, 900, 40)
            np.testing.assert_array_equal(there.read_rows(rows), here.read_rows(rows))
            if here.dtype.kind in "iuf":
                ours, theirs = (np.empty((33, *here.shape[1:]), here.dtype) for _ in range(2))
                assert there.read_into(5, ours) == here.read_into(5, theirs)
                np.testing.assert_array_equal(ours, theirs)
            node.land(int(number))
        node.publish()
        origin.is_lost = True
        np.testing.assert_array_equal(there[:], here[:])
        assert there._handle.file.driver == "sec2"


def test_chunks_are_read_past_the_lock_of_h5py(tmp_path):
    make_h5(tmp_path / "made.h5")
    node = Node(tmp_path, (tmp_path / "made.h5").read_bytes())
    overlay = Overlay(node.file, origin := Counted(node.source))
    with HDF5Matrix.arriving(overlay, node.path, "gzip") as matrix:
        places = matrix._handle.reader._places
        assert isinstance(places, arriving.ChunkPlaces)
        origin.reads.clear()
        with h5py.File(tmp_path / "made.h5") as file:
            info = file["gzip"].id.get_chunk_info_by_coord((70, 0, 3))
        mask, stored = places.read((70, 0, 3))
    assert (mask, stored) == (info.filter_mask, node.body[info.byte_offset : info.byte_offset + info.size])


def test_rows_that_lie_as_they_are_come_from_what_has_landed_or_the_source(tmp_path):
    """Chunks without filters too: of the file on the disk nothing is read that has not landed."""
    make_h5(tmp_path / "made.h5")
    node = Node(tmp_path, (tmp_path / "made.h5").read_bytes())
    for name in ("plain chunks", "block"):
        overlay = Overlay(node.file, origin := Counted(node.source))
        with HDF5Matrix.arriving(overlay, node.path, name) as matrix, h5py.File(tmp_path / "made.h5") as file:
            reader = matrix._handle.reader
            assert type(reader).__name__ == "StoredReader"
            assert reader._source is overlay
            assert reader._descriptor is None
            origin.reads.clear()
            overlay._blocks.clear()
            np.testing.assert_array_equal(matrix[14:18], file[name][14:18])
            assert origin.reads


@pytest.mark.parametrize("name", [*NAMES[:6], "view"])
def test_rows_lie_in_the_same_chunks_before_and_after(file_node, tmp_path, name):
    """The order of samples follows from them."""
    arriving_one = HDF5Matrix.arriving(Overlay(file_node.file), file_node.path, name, 5)
    with HDF5Matrix(tmp_path / "made.h5", name, 5) as here, arriving_one as there:
        assert there.segments == here.segments
        assert type(there._handle.reader) is type(here._handle.reader)


def test_a_file_that_claims_too_much_is_refused_before_it_is_there(tmp_path):
    with h5py.File(tmp_path / "made.h5", "w") as file:
        file.create_dataset("x", (10**12, 32), "f4", chunks=(64, 32), compression="gzip")
    node = Node(tmp_path, (tmp_path / "made.h5").read_bytes())
    with pytest.raises(DataError, match=r"x\.h5: dataset '/x' is not believable: it claims"):
        HDF5Matrix.arriving(Overlay(node.file), node.path, "x")


def test_a_file_that_arrives_leads_nowhere_even_when_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(HDF5Matrix, "allow_external", True)
    make_h5(tmp_path / "made.h5")
    with h5py.File(tmp_path / "elsewhere.h5", "w") as file:
        file["x"] = np.arange(9)
    with h5py.File(tmp_path / "made.h5", "r+") as file:
        layout = h5py.VirtualLayout((9,), "i8")
        layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (9,), "i8")
        file.create_virtual_dataset("other", layout)
    node = Node(tmp_path, (tmp_path / "made.h5").read_bytes())
    for name in ("outside", "other"):
        assert HDF5Matrix(tmp_path / "made.h5", name)[:].tolist() == list(range(9))
        with pytest.raises(DataError, match="reads another file") as failed:
            HDF5Matrix.arriving(Overlay(node.file), node.path, name)
        assert "stage: before" in failed.value.hint


def test_a_source_that_is_lost_ends_a_read_with_its_error(file_node):
    for name in NAMES[:4]:
        overlay = Overlay(file_node.file, origin := Counted(file_node.source))
        with HDF5Matrix.arriving(overlay, file_node.path, name) as matrix:
            overlay._blocks.clear()
            origin.is_lost = True
            with pytest.raises(DataError, match="the source was lost"):
                matrix[200:700]


def test_data_in_other_files_is_refused_here_too(file_node):
    overlay = Overlay(file_node.file)
    with pytest.raises(DataError, match=r"x\.h5: dataset 'outside' reads another file"):
        HDF5Matrix.arriving(overlay, file_node.path, "outside")
    with pytest.raises(DataError, match=r"x\.h5: no dataset 'none'"):
        HDF5Matrix.arriving(overlay, file_node.path, "none")


def test_a_file_that_is_none_of_hdf5(tmp_path):
    node = Node(tmp_path, os.urandom(3000))
    with pytest.raises(DataError, match=r"x\.h5: not a readable HDF5 file"):
        HDF5Matrix.arriving(Overlay(node.file), node.path, "x")


PROGRAM = """
import sys
from pathlib import Path
from hpcutils.data.hdf5 import HDF5Matrix

class Bytes:
    def __init__(self, path):
        self.body = Path(path).read_bytes()
        self.size_bytes = len(self.body)
    def read_into(self, offset, buffer):
        buffer[:] = self.body[offset : offset + len(buffer)]

kept = [HDF5Matrix.arriving(Bytes(sys.argv[1]), "/nowhere/x.h5", name) for name in ("gzip", "block", "text")]
print(kept[0][:3].sum())
"""


def test_a_program_that_ends_without_closing_ends_well(tmp_path):
    """HDF5 closes what is open after the interpreter's end, and would call Python then."""
    make_h5(tmp_path / "made.h5")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "made.h5")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
