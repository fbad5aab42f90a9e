"""Odd, damaged and treacherous HDF5 files: what HDF5Matrix reads right, and what it refuses."""

import os
import pickle
import subprocess
import sys
import tracemalloc
import zlib

import h5py
import numpy as np
import pytest

from hpcutils.data import readers, stored
from hpcutils.data.chunks import CACHE, LIBDEFLATE, inflate, inflate_by_zlib, undo_filters
from hpcutils.data.claims import most_bytes
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.errors import DataError

ARRAY = np.arange(100 * 6, dtype="f4").reshape(100, 6)
SHUFFLED = {"chunks": (16, 6), "compression": "gzip", "shuffle": True}


def write(path, array=ARRAY, name="data", **options):
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=array, **(options or SHUFFLED))
    return path


# -- odd files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SHUFFLED, {"chunks": (16, 6)}, {}], ids=["shuffled", "chunked", "contiguous"])
def test_a_user_block_before_the_data(tmp_path, options):
    with h5py.File(tmp_path / "block.h5", "w", userblock_size=1024) as file:
        file.create_dataset("data", data=ARRAY, **options)
    matrix = HDF5Matrix(tmp_path / "block.h5", "data")
    rows = np.array([50, 3, 99, 0])
    assert np.array_equal(matrix.read_rows(rows), ARRAY[rows])
    assert np.array_equal(matrix[3:40], ARRAY[3:40])


def test_filters_left_out_for_single_chunks(tmp_path):
    with h5py.File(tmp_path / "mask.h5", "w") as file:
        dataset = file.create_dataset("data", (64, 6), "<f4", **SHUFFLED)
        for number, mask in enumerate((0b00, 0b01, 0b10, 0b11)):
            data = ARRAY[16 * number : 16 * (number + 1)]
            stored = data.tobytes() if mask & 1 else np.ascontiguousarray(data.view("u1").reshape(-1, 4).T).tobytes()
            dataset.id.write_direct_chunk((16 * number, 0), stored if mask & 2 else zlib.compress(stored), mask)
        assert np.array_equal(dataset[:], ARRAY[:64])
    matrix = HDF5Matrix(tmp_path / "mask.h5", "data")
    assert np.array_equal(matrix[:], ARRAY[:64])
    assert np.array_equal(matrix[::-5], ARRAY[:64][::-5])


@pytest.mark.parametrize("damage", ["zeros", "cut", "too much"])
def test_a_damaged_chunk_is_named(tmp_path, damage):
    whole = zlib.compress(ARRAY[:16].tobytes())
    bad = {"zeros": bytes(len(whole)), "cut": whole[:-30], "too much": zlib.compress(bytes(10**7))}[damage]
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        dataset = file.create_dataset("data", (100, 6), "<f4", chunks=(16, 6), compression="gzip")
        dataset.id.write_direct_chunk((32, 0), bad)
    matrix = HDF5Matrix(tmp_path / "bad.h5", "data")
    assert np.array_equal(matrix[0:20], np.zeros((20, 6)))
    with pytest.raises(DataError, match=r"bad\.h5, dataset /data, chunk at \(32, 0\)"):
        matrix[[1, 40]]


@pytest.mark.parametrize("call", [inflate, inflate_by_zlib], ids=lambda call: call.__name__)
def test_both_engines_inflate_and_refuse_alike(call):
    data = np.random.default_rng(0).integers(0, 9, 50_000).astype("u1").tobytes()
    stored = zlib.compress(data)
    assert call(stored, len(data)) == data
    assert call(stored + b"more", len(data)) == data
    wrong_sum = stored[:-1] + bytes([stored[-1] ^ 1])
    cases = (
        (stored[:-2], 50_000, "50000, then breaks off"),
        (wrong_sum, 50_000, "is damaged: .*incorrect data check"),
        (stored, 49_999, "should hold 49999 bytes and holds more"),
        (stored, 50_001, "should hold 50001 bytes and holds 50000"),
        (b"x" * 50, 50, "is damaged: "),
        (b"", 50, "holds 0, then breaks off"),
    )
    for bad, size, said in cases:
        with pytest.raises(DataError, match=f"compressed chunk.*{said}"):
            call(bad, size)


def test_a_chunk_that_claims_to_be_small_is_never_inflated_whole():
    bomb = zlib.compress(bytes(1 << 28))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="should hold 4096 bytes and holds more"):
            inflate(bomb, 4096)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_fast_engine_is_used_when_it_is_installed():
    installed = subprocess.run([sys.executable, "-c", "import deflate"], capture_output=True, check=False).returncode == 0
    assert (LIBDEFLATE is not None) == installed


def test_an_unfiltered_chunk_of_the_wrong_size():
    with pytest.raises(DataError, match="should hold 100 bytes and holds 99"):
        undo_filters(bytes(99), (), 0, 100)


def test_a_file_cut_short(tmp_path):
    path = write(tmp_path / "cut.h5", np.zeros((4000, 6), "f4"), chunks=None)
    matrix = HDF5Matrix(path, "data")
    reader = matrix._open().reader
    os.truncate(path, 50_000)
    with pytest.raises(DataError, match="the file ends before row 3999"):
        reader.read(np.array([3999, 1]))
    with pytest.raises(DataError, match="not a readable HDF5 file"):
        matrix[3999]


def test_chunks_too_large_to_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "HELD_BYTES", 90)
    path = write(tmp_path / "lzf.h5", chunks=(16, 6), compression="lzf")
    rows = np.array([70, 3, 3, 4, 5, 99])
    used = CACHE.used_bytes
    assert np.array_equal(HDF5Matrix(path, "data").read_rows(rows), ARRAY[rows])
    assert CACHE.used_bytes == used


def test_strings_records_and_array_types(tmp_path):
    strings = np.array([b"one", b"three", b""] * 10, object)
    records = np.array([(1, 2.0), (3, 4.0)] * 15, [("a", "i4"), ("b", "f8")])
    with h5py.File(tmp_path / "types.h5", "w") as file:
        file.create_dataset("strings", data=strings, dtype=h5py.string_dtype(), chunks=(4,))
        file.create_dataset("records", data=records, chunks=(4,), compression="gzip")
        file.create_dataset("arrays", (30,), np.dtype(("f4", (2, 3))))[:] = np.arange(180).reshape(30, 2, 3)
    rows = np.array([29, 0, 7, 7])
    for name, array in (("strings", strings), ("records", records), ("arrays", np.arange(180.0).reshape(30, 2, 3))):
        matrix = HDF5Matrix(tmp_path / "types.h5", name)
        assert matrix.shape == array.shape
        assert np.array_equal(matrix.read_rows(rows), array[rows])
        assert np.array_equal(matrix[5:9], array[5:9])
        assert np.array_equal(matrix[::-4], array[::-4])
    matrix = HDF5Matrix(tmp_path / "types.h5", "records")
    assert np.array_equal(matrix[3:9]["a"], records[3:9]["a"])
    for key in ("a", ["a", "b"], ("a", 1)):
        with pytest.raises(IndexError):
            matrix[key]


# -- files that point elsewhere ---------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "secret.bin").write_bytes(ARRAY.tobytes())
    write(tmp_path / "secret.h5")
    with h5py.File(tmp_path / "secret.h5", "a") as file:
        file["hidden"] = ARRAY


def external_link(file, folder):
    file["data"] = h5py.ExternalLink("secret.h5", "/data")


def soft_link_to_external_link(file, folder):
    file["way/out"] = h5py.ExternalLink("secret.h5", "/")
    file["data"] = h5py.SoftLink("/way/out/data")


def external_storage(file, folder):
    file.create_dataset("data", ARRAY.shape, "<f4", external=[(str(folder / "secret.bin"), 0, h5py.h5f.UNLIMITED)])


def view(file, folder):
    layout = h5py.VirtualLayout(ARRAY.shape, "f4")
    layout[:] = h5py.VirtualSource(str(folder / "secret.h5"), "hidden", ARRAY.shape, dtype="f4")
    file.create_virtual_dataset("data", layout)


def view_of_a_link(file, folder):
    file["link"] = h5py.ExternalLink("secret.h5", "/data")
    layout = h5py.VirtualLayout(ARRAY.shape, "f4")
    layout[:] = h5py.VirtualSource(".", "link", ARRAY.shape, dtype="f4")
    file.create_virtual_dataset("data", layout)


@pytest.mark.parametrize("trap", [external_link, soft_link_to_external_link, external_storage, view, view_of_a_link])
def test_files_that_read_other_files_are_refused(tmp_path, secret, trap, monkeypatch):
    path = tmp_path / "trap.h5"
    with h5py.File(path, "w") as file:
        trap(file, tmp_path)
    with pytest.raises(DataError, match=r"reads another file(.|\n)*hint: if you trust this file"):
        HDF5Matrix(path, "data")
    trusted = HDF5Matrix.trusting(path, "data", 10)
    assert np.array_equal(trusted[[1, 0]], ARRAY[[11, 10]])
    assert np.array_equal(pickle.loads(pickle.dumps(trusted))[:], ARRAY[10:])
    monkeypatch.setattr(HDF5Matrix, "allow_external", True)
    assert np.array_equal(HDF5Matrix(path, "data")[5:50], ARRAY[5:50])


@pytest.mark.parametrize("options", [{"chunks": None}, {"chunks": (16, 6)}, {"chunks": (16, 6), "compression": "gzip"}], ids=str)
@pytest.mark.parametrize("trap", [external_link, view_of_a_link])
def test_a_trusted_link_reads_the_other_file_and_sees_it_change(tmp_path, options, trap):
    write(tmp_path / "secret.h5", **options)
    with h5py.File(tmp_path / "trap.h5", "w") as file:
        trap(file, tmp_path)
    with HDF5Matrix.trusting(tmp_path / "trap.h5", "data") as matrix:
        for array in (ARRAY, ARRAY + 1):
            write(tmp_path / "new.h5", array, **options).rename(tmp_path / "secret.h5")
            for key in (slice(3, 40), [90, 5, 6, 5], 7):
                assert np.array_equal(matrix[key], array[key]), key
        code = "import h5py, sys; h5py.File(sys.argv[1], 'r+').close()"
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "secret.h5"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), "no lock is kept"
        assert np.array_equal(matrix[3:40], (ARRAY + 1)[3:40])
        (tmp_path / "secret.h5").unlink()
        with pytest.raises(DataError, match=r"secret\.h5"):
            matrix[3:40]


# -- files that claim to be large -------------------------------------------------------------------------------------

VIDEO = (32, 32, 3)


def pictures(file, **options):
    file.create_dataset("data", (10**12, *VIDEO), "f4", **options)


def never_written(file):
    pictures(file, chunks=(64, *VIDEO), compression="gzip", shuffle=True)


def never_written_in_one_piece(file):
    pictures(file)


def one_chunk_of_zeros(file):
    never_written(file)
    file["data"].id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(64 * 32 * 32 * 3 * 4)))


def every_row_the_same(file):
    """A small dataset, shown a million times over."""
    file["small"] = np.zeros((1000, 6), "f4")
    layout = h5py.VirtualLayout((10**9, 6), "f4")
    source = h5py.VirtualSource(".", "small", (1000, 6), dtype="f4")
    for number in range(3):
        layout[1000 * number : 1000 * (number + 1)] = source
    file.create_virtual_dataset("data", layout)


def huge_chunks(file):
    file.create_dataset("data", (4, 1 << 28), "f8", chunks=(1, 1 << 28), compression="gzip")


@pytest.mark.parametrize(
    "bomb",
    [never_written, never_written_in_one_piece, one_chunk_of_zeros, every_row_the_same, huge_chunks],
    ids=lambda f: f.__name__,
)
def test_what_claims_more_than_can_be_stored_is_refused(tmp_path, bomb):
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        bomb(file)
    assert (tmp_path / "bomb.h5").stat().st_size < 100_000
    with pytest.raises(DataError, match=r"'/data' is not believable: it(.|\n)*trust_files: true(.|\n)*HDF5Matrix\.trusting"):
        HDF5Matrix(tmp_path / "bomb.h5", "data")
    assert HDF5Matrix.trusting(tmp_path / "bomb.h5", "data").nbytes > 1 << 30


def test_what_deflate_can_have_made_is_believed(tmp_path):
    """Three GiB of zeros in 3 MB: as small as deflate can make them."""
    chunk = zlib.compress(bytes(64 << 20), 9)
    with h5py.File(tmp_path / "zeros.h5", "w") as file:
        data = file.create_dataset("data", (48 << 10, 1 << 14), "f4", chunks=(1 << 10, 1 << 14), compression="gzip")
        for start in range(0, 48 << 10, 1 << 10):
            data.id.write_direct_chunk((start, 0), chunk)
    assert (tmp_path / "zeros.h5").stat().st_size < 4 << 20
    assert not HDF5Matrix(tmp_path / "zeros.h5", "data")[40_000].any()


def test_a_view_is_believed_when_its_parts_are(tmp_path):
    chunk = zlib.compress(bytes(64 << 20), 9)
    with h5py.File(tmp_path / "view.h5", "w") as file:
        rows = file.create_dataset("rows", (32 << 10, 1 << 14), "f4", chunks=(1 << 10, 1 << 14), compression="gzip")
        for start in range(0, 32 << 10, 1 << 10):
            rows.id.write_direct_chunk((start, 0), chunk)
        layout = h5py.VirtualLayout((20 << 10, 1 << 14), "f4")
        layout[:] = h5py.VirtualSource(".", "rows", rows.shape, "f4")[: 20 << 10]
        file.create_virtual_dataset("data", layout)
    assert HDF5Matrix(tmp_path / "view.h5", "data").nbytes == 5 << 28


@pytest.mark.parametrize(
    ("filters", "best"), [((), 1), ((1,), 1032), ((2, 1), 1032), ((32015,), 32768), ((1, 1), 1032**2), ((2, 99), 1032)]
)
def test_what_filters_can_make_of_a_byte(filters, best):
    assert most_bytes(10, filters) == 10 * best


def test_a_refused_link_is_not_followed(tmp_path):
    """The other file is a pipe: opening it would block for ever."""
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(tmp_path / "trap.h5", "w") as file:
        file["data"] = h5py.ExternalLink("pipe", "/data")
    with pytest.raises(DataError, match="leads out of it"):
        HDF5Matrix(tmp_path / "trap.h5", "data")


def test_links_inside_of_the_file_are_followed(tmp_path):
    with h5py.File(tmp_path / "links.h5", "w") as file:
        file.create_dataset("deep/er/data", data=ARRAY, **SHUFFLED)
        file["deep/soft"] = h5py.SoftLink("er")
        file["absolute"] = h5py.SoftLink("/deep/soft/data")
        file["hard"] = file["deep/er/data"]
        file["loop"] = h5py.SoftLink("/loop")
        file["dangling"] = h5py.SoftLink("/nowhere")
        layout = h5py.VirtualLayout((200, 6), "f4")
        layout[:100] = h5py.VirtualSource(".", "absolute", ARRAY.shape, dtype="f4")
        layout[100:] = h5py.VirtualSource(".", "not/yet", ARRAY.shape, dtype="f4")
        file.create_virtual_dataset("view", layout, fillvalue=-1)
    for name in ("deep/soft/data", "absolute", "hard"):
        assert np.array_equal(HDF5Matrix(tmp_path / "links.h5", name)[[7, 99]], ARRAY[[7, 99]])
    view_of_both = HDF5Matrix(tmp_path / "links.h5", "view")
    assert np.array_equal(view_of_both[[7, 150]], [ARRAY[7], np.full(6, -1)])
    with pytest.raises(DataError, match="more than 32 soft links"):
        HDF5Matrix(tmp_path / "links.h5", "loop")
    with pytest.raises(DataError, match="no dataset 'dangling'"):
        HDF5Matrix(tmp_path / "links.h5", "dangling")


# -- rows that lie in the file as they are ----------------------------------------------------------------------------


def chunks_in_any_order(file):
    dataset = file.create_dataset("data", ARRAY.shape, "f4", chunks=(16, 6))
    for start in (64, 0, 96, 32, 16, 80, 48):
        dataset[start : start + 16] = ARRAY[start : start + 16]


def cut_to_fewer_rows(file):
    dataset = file.create_dataset("data", data=np.concatenate([ARRAY, ARRAY]), chunks=(16, 6), maxshape=(None, 6))
    dataset.resize(100, 0)


def chunk_never_written(file):
    dataset = file.create_dataset("data", ARRAY.shape, "f4", chunks=(16, 6), fillvalue=-1)
    dataset[:32], dataset[64:] = ARRAY[:32], ARRAY[64:]


def split_rows(file):
    file.create_dataset("data", data=ARRAY, chunks=(16, 4))


def nothing_written(file):
    file.create_dataset("data", ARRAY.shape, "f4", fillvalue=-1)


@pytest.mark.parametrize(
    ("make", "reader"),
    [
        (chunks_in_any_order, "StoredReader"),
        (cut_to_fewer_rows, "StoredReader"),
        (lambda file: file.create_dataset("data", data=ARRAY), "StoredReader"),
        (chunk_never_written, "ChunkReader"),
        (split_rows, "ChunkReader"),
        (nothing_written, "LibraryReader"),
    ],
    ids=["any order", "cut", "contiguous", "hole", "split rows", "never written"],
)
def test_unfiltered_rows(tmp_path, make, reader, request):
    with h5py.File(tmp_path / "file.h5", "w") as file:
        make(file)
        array = file["data"][:]
    with HDF5Matrix(tmp_path / "file.h5", "data", 1) as matrix:
        assert type(matrix._open().reader).__name__ == reader
        array = array[1:]
        for key in (
            slice(3, 40),
            slice(None),
            slice(14, 16),
            slice(90, 99),
            [98, 3, 3, 4, 5, 15, 16],
            31,
            -1,
            slice(None, None, -7),
        ):
            assert np.array_equal(matrix[key], array[key]), key
        out = np.empty((50, 6), "f4")
        pieces = {"split rows": 8, "contiguous": 1, "never written": 1}
        assert matrix.read_into(20, out) == pieces.get(request.node.callspec.id, 4)
        assert np.array_equal(out, array[20:70])


def test_a_dataset_of_very_many_chunks_is_left_to_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "MAX_PLACES", 6)
    matrix = HDF5Matrix(write(tmp_path / "file.h5", chunks=(16, 6)), "data")
    assert isinstance(matrix._open().reader, readers.ChunkReader)
    assert np.array_equal(matrix[10:70], ARRAY[10:70])


def test_a_slice_of_a_file_cut_short(tmp_path):
    for chunks in (None, (16, 6)):
        path = write(tmp_path / "cut.h5", np.zeros((4000, 6), "f4"), chunks=chunks)
        reader = HDF5Matrix(path, "data")._open().reader
        os.truncate(path, 50_000)
        with pytest.raises(DataError, match=r"dataset /data: the file ends before row 10"):
            reader.read_range(10, 4000)
