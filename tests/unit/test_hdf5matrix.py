"""HDF5Matrix beside its keys: errors, processes, threads, replaced and damaged files, and files that point elsewhere."""

import contextlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcutils.data import chunks
from hpcutils.data.chunks import CACHE, ChunkCache
from hpcutils.data.hdf5 import CopyWarning, HDF5Matrix
from hpcutils.errors import DataError

ARRAY = np.arange(100 * 6, dtype="f4").reshape(100, 6)
SHUFFLED = {"chunks": (16, 6), "compression": "gzip", "shuffle": True}


def write(path, array=ARRAY, name="data", **options):
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=array, **(options or SHUFFLED))
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "file.h5")


# -- what it says when it cannot --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ((0, 101), "end=101 is outside of dataset 'data', which has 100 rows"),
        ((101, None), "start=101"),
        ((-101, None), "start=-101"),
        ((0, -101), "end=-101"),
    ],
)
def test_a_part_outside_of_the_data(path, bounds, said):
    with pytest.raises(DataError, match=said):
        HDF5Matrix(path, "data", *bounds)


def test_start_and_end_are_integers(path):
    with pytest.raises(TypeError):
        HDF5Matrix(path, "data", 0.5)
    assert len(HDF5Matrix(path, "data", np.int64(3), np.uint8(10))) == 7
    assert HDF5Matrix(path, "data", 30, 20).shape == (0, 6)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.h5: No such file"):
        HDF5Matrix(tmp_path / "nothing.h5", "data")


def test_missing_dataset_lists_what_there_is(path):
    with pytest.raises(DataError, match=r"no dataset 'labels'\nhint: the file has data"):
        HDF5Matrix(path, "labels")
    with pytest.raises(DataError, match="no dataset 'data/more'"):
        HDF5Matrix(path, "data/more")


def test_not_hdf5(tmp_path):
    other = tmp_path / "other.h5"
    other.write_bytes(b"not a data file" * 100)
    with pytest.raises(DataError, match="not a readable HDF5 file"):
        HDF5Matrix(other, "data")
    with pytest.raises(DataError, match="is a folder"):
        HDF5Matrix(tmp_path, "data")


def test_groups_scalars_and_empty_dataspaces_have_no_rows(tmp_path):
    with h5py.File(tmp_path / "odd.h5", "w") as file:
        file["group/data"] = ARRAY
        file["scalar"] = 3.0
        file["empty"] = h5py.Empty("f4")
    for name, said in (("group", "is a group"), ("", "is a group"), ("scalar", "no rows"), ("empty", "no rows")):
        with pytest.raises(DataError, match=said):
            HDF5Matrix(tmp_path / "odd.h5", name)
    assert HDF5Matrix(tmp_path / "odd.h5", "/group/./data/").shape == ARRAY.shape


def test_a_normalizer_that_drops_rows(path):
    with pytest.raises(DataError, match=r"normalizer .* made shape \(6,\) of \(1, 6\)"):
        HDF5Matrix(path, "data", normalizer=lambda rows: rows[0])


def test_read_rows_wants_row_numbers(path):
    matrix = HDF5Matrix(path, "data")
    for wrong in (np.array([[1]]), np.array([0.5]), np.array([100]), np.array([True])):
        with pytest.raises(IndexError):
            matrix.read_rows(wrong)
    assert matrix.read_rows(np.array([])).shape == (0, 6)


# -- what is not asked for is not read --------------------------------------------------------------------------------


def test_the_normalizer_is_probed_with_one_row_and_always_gets_a_batch(path):
    seen = []

    def normalizer(rows):
        seen.append(rows.shape)
        return rows.sum(axis=1)

    matrix = HDF5Matrix(path, "data", 10, 20, normalizer)
    assert (matrix.shape, matrix.dtype, matrix.ndim, matrix.size) == ((10,), np.float32, 1, 10)
    assert seen == [(1, 6)]
    assert matrix[3] == ARRAY[13].sum()
    assert np.array_equal(matrix[[5, 2]], ARRAY[[15, 12]].sum(axis=1))
    assert seen[1:] == [(1, 6), (2, 6)]


def test_results_may_be_written_to(path):
    matrix = HDF5Matrix(path, "data")
    for key in (slice(0, 20), [3, 1], 5, slice(None, None, 3)):
        first = matrix[key]
        first[...] = -1
        assert np.array_equal(matrix[key], ARRAY[key])


def test_a_small_part_does_not_keep_the_rows(path):
    column = HDF5Matrix(path, "data")[:, 0]
    assert column.base is None
    assert np.array_equal(column, ARRAY[:, 0])


def test_each_chunk_is_fetched_once_a_request(path, tmp_path):
    big = write(tmp_path / "big.h5", np.arange(4000, dtype="f4").reshape(400, 10), chunks=(16, 10), compression="gzip")
    matrix = HDF5Matrix(big, "data")
    CACHE.renew()
    matrix.read_rows(np.random.default_rng(0).permutation(400)[:200])
    # Every chunk was wanted in part: each is in the cache once, and none was inflated twice to get there.
    assert CACHE.used_bytes == 25 * 16 * 10 * 4
    CACHE.renew()
    matrix[:]
    assert CACHE.used_bytes == 0, "chunks that were used whole are not kept"


def test_the_cache_is_bounded():
    cache = ChunkCache(100)
    for i in range(10):
        cache.put(("a", i), f"chunk {i}", 30)
    assert cache.used_bytes == 90
    assert [i for i in range(10) if cache.get(("a", i))] == [7, 8, 9]
    cache.get(("a", 7))
    cache.put(("b", 0), "more", 30)
    assert cache.get(("a", 8)) is None and cache.get(("a", 7)) == "chunk 7"
    cache.put(("b", 1), "too large", 101)
    assert cache.get(("b", 1)) is None
    cache.drop("a")
    assert (cache.used_bytes, cache.get(("b", 0))) == (30, "more")


def test_copying_it_whole_warns_with_the_size(path):
    matrix = HDF5Matrix(path, "data")
    with pytest.warns(CopyWarning, match=r"0\.0 MiB \(2400 bytes\)"):
        assert np.array_equal(np.asarray(matrix), ARRAY)
    with pytest.warns(CopyWarning):
        assert np.asarray(matrix, "f8").dtype == np.float64
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(matrix, copy=False)


def test_importing_it_imports_neither_keras_nor_tensorflow():
    code = "import sys, hpcutils.data.hdf5, hpcutils.data.arrays; print(sorted({'keras', 'tensorflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# -- processes and threads --------------------------------------------------------------------------------------------


def halve(rows):
    return rows / 2


def test_pickles_without_data_and_from_another_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matrix = HDF5Matrix("file.h5", "data", 5, -5, halve)
    data = pickle.dumps(matrix)
    assert len(data) < 1000
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = pickle.loads(data)
    assert np.array_equal(again[::3], ARRAY[5:-5][::3] / 2)
    assert again.shape == matrix.shape


def descriptors(path):
    """The numbers under which this process has the file open."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the folder
            found[int(entry.name)] = entry.readlink()
    return [number for number, opened in found.items() if opened == path]


def child_reads(matrices, rows, results):
    answers = [matrix.read_rows(rows).tobytes() for matrix in matrices]
    for number in descriptors(Path(matrices[0].datapath)):
        os.lseek(number, 4321, os.SEEK_SET)  # the parent would see this on a descriptor that is still shared
    results.put((os.getpid(), answers))


@pytest.mark.forks
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_open_it_for_themselves(path, method):
    matrices = [HDF5Matrix(path, "data"), HDF5Matrix(path, "data", 50)]
    rows = np.array([3, 49, 17, 3])
    expected = [matrix.read_rows(rows).tobytes() for matrix in matrices]
    context = multiprocessing.get_context(method)
    results = context.Queue()
    children = [context.Process(target=child_reads, args=(matrices, rows, results)) for _ in range(3)]
    for child in children:
        child.start()
    answers = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert len({pid for pid, _ in answers} - {os.getpid()}) == 3
    assert all(got == expected for _, got in answers)
    positions = [Path(f"/proc/self/fdinfo/{number}").read_text().split()[1] for number in descriptors(path)]
    assert positions and "4321" not in positions, "what was inherited is closed, not used"
    assert [matrix.read_rows(rows).tobytes() for matrix in matrices] == expected


@pytest.mark.forks
def test_fork_while_threads_read(path):
    matrix, stop, errors = HDF5Matrix(path, "data"), threading.Event(), []

    def read():
        while not stop.is_set():
            CACHE.renew()
            if not np.array_equal(matrix[::7], ARRAY[::7]):
                errors.append("wrong rows")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    try:
        for _ in range(10):
            child = context.Process(target=lambda: results.put(bool(np.array_equal(matrix[:], ARRAY))))
            child.start()
            child.join(30)
            assert child.exitcode == 0 and results.get()
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert errors == []


@pytest.mark.parametrize("options", [SHUFFLED, {"compression": "lzf"}, {"chunks": (7, 2)}, {}], ids=str)
def test_many_threads_share_it(tmp_path, options):
    matrix = HDF5Matrix(write(tmp_path / "file.h5", **(options or {"chunks": None})), "data")
    rng = np.random.default_rng(1)
    wanted = [rng.integers(0, 100, 30) for _ in range(200)]

    def read(rows):
        CACHE.renew()
        return matrix.read_rows(rows)

    with ThreadPoolExecutor(8) as pool:
        for rows, got in zip(wanted, pool.map(read, wanted), strict=True):
            assert np.array_equal(got, ARRAY[rows])


def test_many_threads_read_strings(tmp_path):
    strings = np.array([b"x" * (i % 50) for i in range(1000)], object)
    path = write(tmp_path / "strings.h5", strings, dtype=h5py.string_dtype(), chunks=(16,))
    matrices = [HDF5Matrix(path, "data") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda i: matrices[i % 4][i::7], range(60)):
            assert set(map(len, got)) <= set(range(50))


def test_a_thread_may_read_while_the_interpreter_ends(path):
    code = (
        "import sys, threading, time; from hpcutils.data.hdf5 import HDF5Matrix; x = HDF5Matrix(sys.argv[1], 'data')\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print(x[:].shape))).start()"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("(100, 6)\n", "")


@pytest.mark.forks
def test_a_forked_child_starts_with_an_empty_cache(path):
    HDF5Matrix(path, "data")[5]
    assert CACHE.used_bytes > 0
    results = multiprocessing.get_context("fork").SimpleQueue()
    child = multiprocessing.get_context("fork").Process(
        target=lambda: results.put((CACHE.used_bytes, chunks.WORKERS._pool is None))
    )
    child.start()
    child.join(30)
    assert results.get() == (0, True)


# -- the file changes -------------------------------------------------------------------------------------------------


def test_a_replaced_file_is_seen(path, tmp_path):
    matrix = HDF5Matrix(path, "data")
    before = matrix[[1, 99]]
    write(tmp_path / "new.h5", ARRAY + 1).replace(path)
    assert np.array_equal(matrix[[1, 99]], before + 1)


def test_a_file_written_in_place_is_seen_by_all_matrices(path):
    first, second = HDF5Matrix(path, "data"), HDF5Matrix(path, "data", 10)
    assert first[5, 0] == ARRAY[5, 0] and second[5, 0] == ARRAY[15, 0]
    inode = path.stat().st_ino
    content = write(path.with_name("new.h5"), ARRAY * 2, chunks=(20, 3), compression="gzip").read_bytes()
    path.write_bytes(content)
    assert path.stat().st_ino == inode
    assert np.array_equal(first[:], ARRAY * 2)
    assert np.array_equal(second[[0, 2]], ARRAY[[10, 12]] * 2)


@pytest.mark.parametrize("new", [ARRAY[:, :5], ARRAY[:50], ARRAY.astype("f8")])
def test_a_file_replaced_by_other_data(path, tmp_path, new):
    matrix = HDF5Matrix(path, "data", 0, 60)
    write(tmp_path / "new.h5", new, chunks=True).replace(path)
    with pytest.raises(DataError, match=r"was replaced: it is .* now, and was at least \(60, 6\) float32"):
        matrix[0]
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        matrix[0]


@pytest.mark.parametrize("options", [SHUFFLED, {}], ids=["shuffled", "contiguous"])
def test_a_file_that_this_process_still_writes(tmp_path, options):
    with h5py.File(tmp_path / "live.h5", "w", locking=False) as writer:
        dataset = writer.create_dataset("data", data=ARRAY, **options)
        matrix = HDF5Matrix(tmp_path / "live.h5", "data")
        dataset[3] = -1
        assert np.array_equal(matrix[[3, 4]], [np.full(6, -1), ARRAY[4]])


@pytest.mark.parametrize("options", [SHUFFLED, {"chunks": None}], ids=["shuffled", "contiguous"])
def test_closed(tmp_path, options):
    path = write(tmp_path / "file.h5", **options)
    CACHE.renew()
    other = HDF5Matrix(path, "data")
    with HDF5Matrix(path, "data") as matrix:
        assert np.array_equal(matrix[[5, 70]], ARRAY[[5, 70]])
        assert (CACHE.used_bytes > 0) is (options is SHUFFLED)
        handle = matrix._open()
    assert not handle.file, "closed for everybody who still holds it"
    assert CACHE.used_bytes == 0
    del handle
    assert matrix.shape == (100, 6)
    assert "file.h5" in repr(matrix)
    with pytest.raises(DataError, match="is closed"):
        matrix[5]
    matrix.close()
    with pytest.raises(DataError, match="is closed"):
        pickle.loads(pickle.dumps(matrix))[5]
    assert np.array_equal(other[5], ARRAY[5]), "another matrix of the same file goes on"
    other.close()
    assert descriptors(path) == []


# -- beside ordinary h5py handles -------------------------------------------------------------------------------------

LOCKINGS = [None, False, True, "best-effort"]


def in_another_process(code, path):
    return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", [SHUFFLED, {"chunks": (16, 6)}, {"chunks": None}], ids=["shuffled", "chunked", "contiguous"])
@pytest.mark.parametrize("locking", LOCKINGS)
def test_an_ordinary_handle_may_be_open_already(tmp_path, options, locking):
    path = write(tmp_path / "file.h5", **options)
    with h5py.File(path, "r", locking=locking) as file:
        matrix = HDF5Matrix(path, "data", 10)
        for key in (slice(3, 50), [5, 80, 5], 7):
            assert np.array_equal(matrix[key], file["data"][10:][key])
        matrix.close()
        assert np.array_equal(file["data"][:], ARRAY), "ours closes only itself"
    assert np.array_equal(HDF5Matrix(path, "data")[:], ARRAY)


@pytest.mark.parametrize("options", [SHUFFLED, {"chunks": (16, 6)}, {"chunks": None}], ids=["shuffled", "chunked", "contiguous"])
def test_an_ordinary_handle_may_be_opened_afterwards(tmp_path, options):
    path = write(tmp_path / "file.h5", **options)
    matrix = HDF5Matrix(path, "data", 10)
    with h5py.File(path) as file, h5py.File(path, "r") as again:
        assert np.array_equal(matrix[3:50], file["data"][13:60])
        assert np.array_equal(matrix[[5, 80]], again["data"][[15, 90]])
    assert np.array_equal(matrix[3:50], ARRAY[13:60]), "theirs closes only itself"


def test_no_lock_is_kept_and_none_of_another_handle_is_lost(path):
    """Another process may write while a matrix is open, and may not while an ordinary handle here holds its lock."""
    code = "import h5py, sys; h5py.File(sys.argv[1], 'r+')['data'][0] = 7"
    matrix = HDF5Matrix(path, "data")
    assert in_another_process(code, path).returncode == 0
    assert np.array_equal(matrix[0], np.full(6, 7))
    matrix.close()
    with h5py.File(path, "r", locking=True), HDF5Matrix(path, "data"):
        assert "lock" in in_another_process(code, path).stderr


def test_a_file_that_another_process_locks_is_read(path):
    code = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        with pytest.raises(OSError, match="lock"):
            h5py.File(path, "r")
        assert np.array_equal(HDF5Matrix(path, "data")[:], ARRAY)


# -- the file changes, or is closed, while threads read ---------------------------------------------------------------


def read_while(change, matrices, keys):
    """Call `change` again and again while threads read; return what went wrong."""
    stop, wrong = threading.Event(), []

    def read(matrix, key):
        while not stop.is_set():
            CACHE.renew()
            try:
                if not np.array_equal(matrix[key], ARRAY[key]):
                    wrong.append("other rows")
            except Exception as exc:  # noqa: BLE001 - the test says which are right
                wrong.append(f"{type(exc).__name__}: {exc}")

    with ThreadPoolExecutor(len(matrices) * len(keys)) as pool:
        running = [pool.submit(read, matrix, key) for matrix in matrices for key in keys]
        for number in range(150):
            change(number)
        stop.set()
    assert all(each.done() for each in running)
    return wrong


@pytest.mark.parametrize(
    "options", [SHUFFLED, {"compression": "lzf", "chunks": (16, 6)}, {"chunks": (7, 2)}, {"chunks": None}], ids=str
)
def test_threads_read_on_when_the_file_changes(tmp_path, options):
    path = write(tmp_path / "file.h5", **options)
    matrices = [HDF5Matrix(path, "data") for _ in range(2)]
    # Another time: the handles are closed and opened anew, as after a write.
    wrong = read_while(
        lambda number: (os.utime(path, (number, number)), matrices[number % 2][0]), matrices, [slice(3, 60), [5, 90]]
    )
    assert wrong == []


@pytest.mark.parametrize("options", [SHUFFLED, {"compression": "lzf", "chunks": (16, 6)}, {"chunks": None}], ids=str)
def test_threads_read_on_when_the_source_of_a_view_changes(tmp_path, options):
    path = write(tmp_path / "rows.h5", **options)
    with h5py.File(tmp_path / "view.h5", "w") as file:
        layout = h5py.VirtualLayout(ARRAY.shape, "f4")
        layout[:] = h5py.VirtualSource("rows.h5", "data", ARRAY.shape, "f4")
        file.create_virtual_dataset("data", layout)
    matrices = [HDF5Matrix.trusting(tmp_path / "view.h5", "data") for _ in range(2)]
    assert type(matrices[0]._handle.reader).__name__ == "ViewReader"
    wrong = read_while(
        lambda number: (os.utime(path, (number, number)), matrices[number % 2][0]), matrices, [slice(3, 60), [5, 90]]
    )
    assert wrong == []


@pytest.mark.parametrize("options", [SHUFFLED, {"compression": "lzf", "chunks": (16, 6)}, {"chunks": None}], ids=str)
def test_a_read_that_close_interrupts_says_so(tmp_path, options):
    path = write(tmp_path / "file.h5", **options)
    for _ in range(30):
        matrix = HDF5Matrix(path, "data")
        wrong = read_while(
            lambda number, matrix=matrix: matrix.close() if number == 100 else matrix.shape, [matrix], [slice(3, 60)]
        )
        assert all(each.startswith("DataError: ") and "is closed" in each for each in wrong)
    assert descriptors(path) == []


@pytest.mark.parametrize("options", [SHUFFLED, {"compression": "lzf", "chunks": (16, 6)}], ids=str)
def test_an_error_names_the_dataset_also_when_it_is_closed(tmp_path, options):
    handle = HDF5Matrix(write(tmp_path / "file.h5", **options), "data")._open()
    handle.file.close()
    with pytest.raises(DataError, match=r"file\.h5, dataset /data: cannot be read"):
        handle.reader.read(range(16, 40))
    with pytest.raises(DataError, match=r"file\.h5, dataset /data: cannot be read"):
        handle.reader.read(np.array([3, 1]))


@pytest.mark.parametrize("options", [SHUFFLED, {"chunks": (16, 6)}, {"chunks": None}], ids=["shuffled", "chunked", "contiguous"])
def test_a_change_that_restores_the_time_is_seen(tmp_path, options):
    """As `rsync --times` and `cp --preserve` leave it: the same size, the same time of change of the data."""
    path = write(tmp_path / "file.h5", **options)
    other = write(tmp_path / "other.h5", ARRAY[::-1], **options).read_bytes()
    size = max(len(other), path.stat().st_size)  # gzip may differ by some bytes; HDF5 takes a longer file
    os.truncate(path, size)
    other = other.ljust(size, b"\0")
    matrix = HDF5Matrix(path, "data")
    assert np.array_equal(matrix[[0, 5]], ARRAY[[0, 5]])
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the kernel's clock for files ticks every few ms
        path.write_bytes(other)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    for key in ([0, 5], slice(3, 40), 99):
        assert np.array_equal(matrix[key], ARRAY[::-1][key])


def test_a_link_or_other_rights_do_not_hurt(path, tmp_path):
    matrix = HDF5Matrix(path, "data")
    (tmp_path / "link.h5").hardlink_to(path)
    assert np.array_equal(matrix[[99, 0]], ARRAY[[99, 0]])
    path.chmod(0o444)
    assert np.array_equal(matrix[[99, 0]], ARRAY[[99, 0]])
