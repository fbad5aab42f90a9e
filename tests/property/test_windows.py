"""Windows: the same rows as the file has, each chunk once, whatever the sizes; and their schedule for any node.

Read by one rank, or by all that were started together (`world.py`).
"""

import itertools
from unittest.mock import patch

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_order import breaks_of
from world import WORLD

from hpcutils.data import shards
from hpcutils.data.hdf5 import HDF5Matrix
from hpcutils.data.order import Order, Seat
from hpcutils.data.schedule import _windows as windows_of
from hpcutils.data.schedule import plan_memory, schedule
from hpcutils.data.shards import Layout, shard_count
from hpcutils.data.windows import WindowReader, layout_of, window_bytes

ROWS = 300


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The same numbers in many forms: filters, types, row shapes, chunks that cut rows in two."""
    path = tmp_path_factory.mktemp("windows") / "data.h5"
    numbers = np.arange(ROWS)
    with h5py.File(path, "w") as file:
        wide = numbers[:, None, None] * 24 + np.arange(24).reshape(4, 6)
        file.create_dataset("gzip", data=wide.astype("f4"), chunks=(7, 4, 6), compression="gzip", shuffle=True)
        file.create_dataset("cut", data=wide.astype("f8"), chunks=(5, 3, 4), compression="gzip", shuffle=True)
        file.create_dataset("big", data=wide.astype(">i2"), chunks=(16, 4, 6), shuffle=True)
        file.create_dataset("raw", data=wide.astype("u4"), chunks=(11, 4, 6))
        file.create_dataset("lzf", data=wide.astype("i8"), chunks=(9, 4, 6), compression="lzf")
        file["plain"] = wide.astype("f4")
        file["y"] = numbers
    return path


@settings(max_examples=40)
@given(data=st.data())
def test_rows_are_the_files_and_each_chunk_is_fetched_once(path, data):
    name = data.draw(st.sampled_from(["gzip", "cut", "big", "raw", "lzf", "plain"]))
    start = data.draw(st.integers(0, 50))
    end = data.draw(st.integers(start + 1, ROWS))
    x, y = HDF5Matrix(path, name, start, end), HDF5Matrix(path, "y", start, end)
    with patch.object(shards, "POOL_BYTES", x.row_bytes * data.draw(st.sampled_from([1, 30, 90, 250]))):
        layout = layout_of(x)
        order = WORLD.seated(Order(layout, data.draw(st.integers(1, 60)), Seat(), 3, data.draw(st.booleans())))
        reader = WindowReader([x, y], order, WORLD.node, 2, data.draw(st.booleans()))
        # Nodes that do not own shards fetch all chunks, each; those that only others need perhaps later.
        times = WORLD.nodes // order.seat.nodes
        for epoch, first_step in ((0, 0), (1, 0), (0, order.steps // 2)):
            reader.begin(epoch, first_step)
            plan = order.epoch(epoch)
            for step in range(first_step, order.steps):
                cut = plan.cut(step)
                rows, labels = reader.read(step, cut)
                if cut.from_node:
                    np.testing.assert_array_equal(labels, cut.rows + start)
                np.testing.assert_array_equal(rows, labels[:, None, None] * 24 + np.arange(24).reshape(4, 6))
            if first_step == 0:
                assert x.segments[0].columns == (4 if name == "cut" else 1)
                fetched, chunks = WORLD.sum(reader.chunks_read(epoch)), layout.chunks * x.segments[0].columns
                assert chunks <= fetched <= chunks * times
        reader.close()


@given(data=st.data())
def test_no_schedule_gets_stuck(data):
    """Played with one rank a node: when a step is read, all that it needs was in a slot that was free by then."""
    row_bytes = data.draw(st.sampled_from([1, shards.POOL_BYTES // 300, shards.POOL_BYTES // 30]))
    chunk_rows = data.draw(st.integers(1, 9))
    samples = data.draw(st.integers(1, 300))
    breaks = data.draw(breaks_of(samples, chunk_rows))
    layout = Layout(samples, chunk_rows, data.draw(st.integers(0, chunk_rows - 1)), row_bytes, breaks)
    nodes = data.draw(st.sampled_from([n for n in range(1, 13) if shard_count(layout) % n == 0]))
    order = Order(layout, data.draw(st.integers(1, 300)), Seat(nodes, data.draw(st.integers(0, nodes - 1))), 5)
    slots = plan_memory(order).slots
    tasks = schedule(order, slots, 0, 0, 2)
    held: dict[int, tuple[int, int, int]] = {}
    task = next(tasks, None)
    plans = [order.epoch(epoch) for epoch in range(2)]
    for epoch, step in itertools.product(range(2), range(order.steps)):
        while task is not None and task.after <= epoch * order.steps + step:
            assert 0 <= task.slot < slots
            held[task.slot] = task.epoch, task.shard, task.window
            task = next(tasks, None)
        cut = plans[epoch].cut(step)
        needed = set(zip(cut.shards.tolist(), cut.windows.tolist(), strict=True)) if cut.from_node else set()
        assert {(epoch, *pair) for pair in needed} <= set(held.values())
    assert task is None


@given(data=st.data())
def test_a_schedule_from_any_step_is_what_is_left_of_the_whole(data):
    row_bytes = data.draw(st.sampled_from([1, shards.POOL_BYTES // 300, shards.POOL_BYTES // 30]))
    chunk_rows = data.draw(st.integers(1, 9))
    layout = Layout(data.draw(st.integers(1, 300)), chunk_rows, data.draw(st.integers(0, chunk_rows - 1)), row_bytes)
    nodes = data.draw(st.sampled_from([n for n in range(1, 13) if shard_count(layout) % n == 0]))
    order = Order(layout, data.draw(st.integers(1, 300)), Seat(nodes, data.draw(st.integers(0, nodes - 1))), 5)
    step = data.draw(st.integers(0, order.steps - 1))
    # (first step, last step, shard, window)
    whole = list(windows_of(order, 1, 0))
    assert list(windows_of(order, 1, step)) == [window for window in whole if window[1] >= step]
    tasks = list(schedule(order, plan_memory(order).slots, 1, step, 3))
    assert [task.number for task in tasks] == list(range(len(tasks)))
    assert [(task.shard, task.window) for task in tasks if task.epoch == 1] == [window[2:] for window in whole if window[1] >= step]
    assert [(task.shard, task.window) for task in tasks if task.epoch == 2] == [window[2:] for window in windows_of(order, 2, 0)]


def test_memory_is_twice_the_pool():
    order = Order(Layout(400_000, 64, 0, 12288), 256)
    assert 1.5 * shards.POOL_BYTES < window_bytes(order, 12288) < 2.05 * shards.POOL_BYTES
    halves = Order(order.layout, 256, Seat(2, 1))
    assert window_bytes(halves, 12288) == pytest.approx(window_bytes(order, 12288) / 2, rel=0.01)


def test_a_damaged_chunk_is_an_error_that_names_it(path, tmp_path):
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(path.read_bytes())
    with h5py.File(damaged, "r+") as file:
        info = file["gzip"].id.get_chunk_info(20)
    with damaged.open("r+b") as stream:
        stream.seek(info.byte_offset + 4)
        stream.write(b"\xff" * 16)
    x = HDF5Matrix(damaged, "gzip")
    order = Order(layout_of(x), 10)
    reader = WindowReader([x], order)
    reader.begin(0)
    plan = order.epoch(0)
    with pytest.raises(Exception, match=r"dataset /gzip, chunk at \(140, 0, 0\)"):
        for step in range(order.steps):
            reader.read(step, plan.cut(step))
    reader.close()
