"""The order: every sample once, the same global batches for any world, the true mean, any position at once."""

import itertools
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcutils.data.order import Certificate, Order, Seat, certificate_of
from hpcutils.data.scramble import permute, table, tables
from hpcutils.data.shards import POOL_BYTES, SHARD_COUNTS, EpochOrder, Layout, node_rows, shard_count
from hpcutils.errors import DataError

# Rows so large that a window holds a chunk or two: datasets of 200 samples have windows, too.
ROW_BYTES = (1, POOL_BYTES // 400, POOL_BYTES // 40)


@st.composite
def layouts(draw, most=200):
    chunk_rows = draw(st.integers(1, 12))
    samples = draw(st.integers(1, most))
    first_rows = draw(st.integers(0, chunk_rows - 1))
    breaks = draw(breaks_of(samples, chunk_rows))
    return Layout(samples, chunk_rows, first_rows, draw(st.sampled_from(ROW_BYTES)), breaks)


def breaks_of(samples, chunk_rows):
    """Where further files begin: some at any sample, each with a first chunk of any size."""
    starts = st.lists(st.integers(1, max(samples - 1, 1)), unique=True, max_size=min(samples - 1, 12)).map(sorted)
    return starts.flatmap(lambda found: st.tuples(*(st.tuples(st.just(s), st.integers(0, chunk_rows - 1)) for s in found)))


@st.composite
def worlds(draw, layout):
    """All seats of a world of up to 9 ranks; by shards where their number allows it."""
    ranks = draw(st.integers(1, 9))
    nodes = draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0 and shard_count(layout) % n == 0]))
    return [Seat(nodes, node, ranks // nodes, rank) for node in range(nodes) for rank in range(ranks // nodes)]


@st.composite
def plans(draw):
    """Orders of all ranks, an epoch."""
    layout = draw(layouts())
    seed, batch = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 200))
    shuffle = draw(st.booleans())
    ranks = draw(st.integers(1, 9))
    seats = draw(worlds(layout)) if shuffle else [Seat(ranks=ranks, rank=rank) for rank in range(ranks)]
    return [Order(layout, batch, seat, seed, shuffle) for seat in seats], draw(st.integers(0, 5))


@given(layouts())
def test_chunks_begin_anew_in_each_file(layout):
    """Against the plain way: cut each file by itself, the first chunk where it was begun before, the last where it ends."""
    expected = []
    edges = [*layout.breaks, (layout.samples, 0)]
    for (start, first), (stop, _) in zip([(0, layout.first_rows), *layout.breaks], edges, strict=False):
        expected += [start, *range(start + (first or layout.chunk_rows), stop, layout.chunk_rows)]
    chunks = np.arange(layout.chunks)
    assert layout.starts(chunks).tolist() == [layout.start(chunk) for chunk in chunks.tolist()] == expected
    assert layout.sizes(chunks).tolist() == np.diff([*expected, layout.samples]).tolist()
    assert [layout.chunk_rows - layout.broken.get(chunk, 0) for chunk in chunks.tolist()] == layout.sizes(chunks).tolist()
    assert 0 not in layout.broken.values()


@settings(max_examples=300)
@given(plans())
def test_every_sample_exactly_once_in_equal_steps(plan):
    orders, number = plan
    assert len({(order.steps, order.local_rows) for order in orders}) == 1
    epochs = [order.epoch(number) for order in orders]
    cuts = [epoch.cut(step) for epoch in epochs for step in range(epoch.order.steps)]
    assert {len(cut.rows) for cut in cuts} == {orders[0].local_rows}
    samples = orders[0].samples
    assert sorted(np.concatenate([cut.rows[: cut.real] for cut in cuts])) == list(range(samples))
    certificate = Certificate()
    for cut in cuts:
        certificate = certificate.add(cut.rows[: cut.real])
    assert certificate == certificate_of(samples)


@given(plans())
def test_global_batches_do_not_depend_on_the_world(plan):
    orders, number = plan
    alone = Order(orders[0].layout, orders[0].batch_size, Seat(), orders[0].seed, orders[0].shuffle).epoch(number)
    epochs = [order.epoch(number) for order in orders]
    for step in range(alone.order.steps):
        whole = alone.cut(step)
        joined = np.concatenate([(cut := epoch.cut(step)).rows[: cut.real] for epoch in epochs])
        assert sorted(joined) == sorted(whole.rows[: whole.real])
        assert all(set(epoch.cut(step).rows) <= set(whole.rows[: whole.real]) for epoch in epochs), "padding is of the batch"


@settings(max_examples=300)
@given(plans())
def test_the_mean_over_ranks_is_the_mean_over_samples(plan):
    orders, number = plan
    values = np.random.default_rng(0).normal(size=orders[0].samples)
    epochs = [order.epoch(number) for order in orders]
    alone = Order(orders[0].layout, orders[0].batch_size, Seat(), orders[0].seed, orders[0].shuffle).epoch(number)
    for step in range(alone.order.steps):
        # What Keras computes on each rank: the weighted sum over the rows, divided by their number.
        means = [float((values[cut.rows] * cut.weights).mean()) for cut in (epoch.cut(step) for epoch in epochs)]
        whole = alone.cut(step)
        np.testing.assert_allclose(np.mean(means), values[whole.rows[: whole.real]].mean(), rtol=0, atol=1e-6)


SIZES = (1, 2, 7, 9, 31, 64, 127, 200)
BATCHES = (1, 3, 8, 9, 63, 64, 199, 200)


@pytest.mark.parametrize("ranks", range(1, 10))
def test_every_world_on_a_grid_of_sizes(ranks):
    """Every (N, batch, ranks) of a grid, cut by count and, where that goes, by nodes: exactly once, equal steps, the true mean."""
    values = np.random.default_rng(1).normal(size=200)
    for samples, batch in itertools.product(SIZES, BATCHES):
        layout = Layout(samples, 4, 3, ROW_BYTES[1])
        for nodes in (n for n in range(1, ranks + 1) if ranks % n == 0 and shard_count(layout) % n == 0):
            seats = [Seat(nodes, node, ranks // nodes, rank) for node in range(nodes) for rank in range(ranks // nodes)]
            epochs = [Order(layout, batch, seat, 3).epoch(1) for seat in seats]
            seen, means = [], []
            for step in range(-(-samples // batch)):
                cuts = [epoch.cut(step) for epoch in epochs]
                assert len({len(cut.rows) for cut in cuts}) == 1
                rows = np.concatenate([cut.rows[: cut.real] for cut in cuts])
                seen.append(rows)
                means.append(np.mean([(values[cut.rows] * cut.weights).mean() for cut in cuts]) - values[rows].mean())
            assert {epoch.order.steps for epoch in epochs} == {len(seen)}
            assert [len(rows) for rows in seen[:-1]] == [batch] * (len(seen) - 1)
            np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(samples))
            assert np.abs(means).max() < 1e-6, (samples, batch, nodes)


@given(plans())
def test_a_node_takes_only_of_its_own_shards(plan):
    for order in plan[0]:
        epoch = order.epoch(plan[1])
        for step in range(order.steps):
            cut = epoch.cut(step)
            assert not cut.from_node or set(cut.shards % order.seat.nodes) == {order.seat.node}
            assert cut.from_node or cut.real == 0


@given(layouts(), st.integers(0, 3), st.booleans(), st.data())
def test_any_run_of_positions_is_reachable_directly(layout, number, shuffle, data):
    whole = EpochOrder(layout, 5, number, shuffle).run(0, layout.samples)
    start = data.draw(st.integers(0, layout.samples))
    stop = data.draw(st.integers(start, layout.samples))
    part = EpochOrder(layout, 5, number, shuffle).run(start, stop)
    for name in ("rows", "shards", "windows", "places"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[start:stop])
    if not shuffle:
        np.testing.assert_array_equal(whole.rows, np.arange(layout.samples))


@given(layouts(), st.integers(0, 3))
def test_a_window_is_neighbouring_places_of_whole_chunks(layout, number):
    order = EpochOrder(layout, 9, number)
    run = order.run(0, layout.samples)
    for shard in range(order.shards):
        before = 0
        for window in (order.window(shard, number) for number in range(order.window_count(shard))):
            ours = (run.shards == shard) & (run.windows == window.number)
            assert window.first == before
            assert sorted(run.places[ours]) == list(range(window.rows))
            chunks = [np.arange(start, start + size) for start, size in zip(window.starts, np.diff(window.offsets), strict=True)]
            np.testing.assert_array_equal(np.concatenate(chunks)[run.places[ours]], run.rows[ours])
            before += window.rows
        assert before == order.sizes[shard]


@given(layouts(most=60), st.integers(0, 3))
def test_the_sequence_is_that_of_exact_times(layout, number):
    """Against fractions: rounding never changes which of two samples of different times comes first."""
    order = EpochOrder(layout, 2, number)
    sizes, taken, last = order.sizes.tolist(), [0] * order.shards, Fraction(0)
    for shard in order.run(0, layout.samples).shards.tolist():
        time = Fraction(2 * taken[shard] * order.shards + 2 * shard + 1, 2 * order.shards * sizes[shard])
        assert last <= time
        taken[shard], last = taken[shard] + 1, time
    assert taken == sizes


@given(layouts(most=400), st.integers(1, 64), st.data())
def test_a_nodes_part_of_a_batch_stays_below_its_bound(layout, batch_size, data):
    nodes = data.draw(st.sampled_from([n for n in range(1, 97) if shard_count(layout) % n == 0]))
    owners = EpochOrder(layout, data.draw(st.integers(0, 9)), data.draw(st.integers(0, 3))).run(0, layout.samples).shards % nodes
    parts = [np.bincount(owners[k : k + batch_size], minlength=nodes).max() for k in range(0, layout.samples, batch_size)]
    assert max(parts) <= node_rows(layout, batch_size, nodes) <= batch_size


def test_even_shards_need_no_padding():
    layout = Layout(96 * 64 * 10, 64, 0, 12288)
    assert [node_rows(layout, 192, nodes) for nodes in SHARD_COUNTS] == [192 // nodes for nodes in SHARD_COUNTS]
    # A broken chunk costs some percent.
    assert node_rows(Layout(400_001, 64, 0, 12288), 256, 2) <= 1.07 * 128
    ten_files = Layout(400_030, 64, 0, 12288, tuple((number * 40_003, 0) for number in range(1, 10)))
    assert len(ten_files.broken) == 10
    assert node_rows(ten_files, 256, 2) <= 1.2 * 128


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permutations_without_a_table(size, key):
    numbers = np.arange(size)
    moved = permute(numbers, size, key)
    np.testing.assert_array_equal(np.sort(moved), numbers)
    np.testing.assert_array_equal(permute(moved, size, key, inverse=True), numbers)
    np.testing.assert_array_equal(np.sort(table(size, key)), numbers)
    shorter = size // 2
    both = tables(np.array([key, key], np.uint64), np.array([size, shorter]), size)
    np.testing.assert_array_equal(both[0], table(size, key))
    np.testing.assert_array_equal(both[1, :shorter], table(shorter, key))


@pytest.mark.parametrize("make", [table, lambda size, key: permute(np.arange(size), size, key)], ids=["table", "feistel"])
def test_permutations_are_random(make):
    """Where a number goes is uniform, and neighbours part: over 100 keys, within five standard deviations."""
    size, keys = 1 << 15, range(100)
    moved = np.stack([make(size, key) for key in keys]) / size
    ends = moved[:, [0, 1, size // 2, size - 1]]
    assert np.abs(ends.mean(axis=0) - 0.5).max() < 5 * 0.2887 / len(keys) ** 0.5
    apart = np.abs(np.diff(moved, axis=1)).mean(axis=1)
    assert np.abs(apart - 1 / 3).max() < 5 * 0.33 / size**0.5
    assert abs(np.corrcoef(moved[0], moved[1])[0, 1]) < 5 / size**0.5


def test_the_order_is_written_down():
    """A recorded run must be repeatable: these numbers may never change."""
    order = EpochOrder(Layout(1000, 10, 3, POOL_BYTES // 500), 7, 1)
    assert (order.shards, order.window_chunks) == (48, 1)
    assert order.run(500, 508).rows.tolist() == RECORDED


RECORDED = [729, 281, 83, 790, 991, 538, 499, 118]


@given(rows=st.lists(st.integers(0, 1000), max_size=30), cut=st.integers(0, 30))
def test_certificates_join(rows, cut):
    array = np.array(rows, dtype=np.int64)
    assert Certificate().add(array[:cut]).join(Certificate().add(array[cut:])) == Certificate().add(array)


@given(samples=st.integers(1, 300), parts=st.integers(1, 9))
def test_the_certificate_of_a_dataset_is_that_of_its_parts(samples, parts):
    joined = Certificate()
    for part in range(parts):
        joined = joined.join(certificate_of(samples * (part + 1) // parts, samples * part // parts, block=7))
    assert joined == certificate_of(samples)


@given(samples=st.integers(2, 300), lost=st.integers(0, 299), twice=st.integers(0, 299))
def test_a_sample_lost_and_another_taken_twice_shows(samples, lost, twice):
    lost, twice = lost % samples, twice % samples
    rows = np.arange(samples)
    rows[lost] = twice
    assert (Certificate().add(rows) == certificate_of(samples)) == (lost == twice)


def test_epochs_and_seeds_differ_and_batch_sizes_do_not():
    layout = Layout(100, 10)
    orders = [EpochOrder(layout, seed, epoch).run(0, 100).rows for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert not any(np.array_equal(one, other) for one, other in ((orders[0], orders[1]), (orders[0], orders[2])))
    for batch_size in (7, 10, 100):
        epoch = Order(layout, batch_size, seed=1).epoch(0)
        cuts = [epoch.cut(step) for step in range(epoch.order.steps)]
        np.testing.assert_array_equal(np.concatenate([cut.rows[: cut.real] for cut in cuts]), orders[0])


def test_no_samples_is_an_error():
    with pytest.raises(DataError, match="no samples"):
        Layout(0)


SCALE = """
import resource, sys, time
import numpy as np
from hpcutils.data.order import Order, Seat
from hpcutils.data.schedule import plan_memory, schedule
from hpcutils.data.shards import Layout
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.process_time()
order = Order(Layout(10**9, 64, 0, 12288), 65536, Seat(48, 11, 86, 3), 1)
order.digest()
last = order.epoch(3).cut(order.steps - 1)
middle = order.epoch(3).cut(order.steps // 2)
# Cut by count alone, a node looks at the windows of all shards, five million.
order = Order(order.layout, 65536, Seat(1, 0, 4096, 11), 1)
slots = plan_memory(order).slots
for step in (0, order.steps // 2, order.steps - 1):
    task = next(schedule(order, slots, 3, step, 9))
    assert task.epoch == 3 and task.before // order.steps == 3 and task.before <= 3 * order.steps + step, task
print(time.process_time() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, middle.real)
"""


def test_a_thousand_million_samples_over_four_thousand_ranks():
    """Plan, two steps far apart, windows from three places on: seconds of processor time and MB beyond numpy's own."""
    done = subprocess.run([sys.executable, "-c", SCALE], capture_output=True, text=True, check=True)
    seconds, megabytes, rows = map(float, done.stdout.split())
    assert seconds < 1
    assert megabytes < 100
    assert rows > 0
