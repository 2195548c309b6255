"""The order of samples: properties over many sizes, and what it costs."""

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orders import global_batch, partition_order

from pipeline.data import order as order_module
from pipeline.data.order import Order, random_bits, steps_per_epoch


def reference(order, epoch, number):
    """A partition written down at once, as the module's docstring says it: no random access."""
    shards = np.argsort(random_bits(order.seed, epoch, 0, 0, len(order.sizes)), kind="stable")
    starts = np.cumsum([0, *order.sizes])
    row = [(place, s) for place, shard in enumerate(shards) if order.sizes[shard]
           for s in range(starts[shard], starts[shard + 1])]  # fmt: skip
    total, parts = len(row), order.partitions
    part = row[number * total // parts : (number + 1) * total // parts]
    noise = random_bits(order.seed, epoch, 1, number, len(part)).tolist()
    # Shards without samples take no place in a window.
    filled = [place for place, shard in enumerate(shards) if order.sizes[shard]]
    first = filled.index(part[0][0])
    keyed = [
        ((filled.index(place) - first) // order.window, draw, sample)
        for (place, sample), draw in zip(part, noise, strict=True)
    ]
    return [sample for _, _, sample in sorted(keyed)]


orders = st.builds(
    lambda sizes, share, partitions, **rest: Order(
        (*sizes, share * partitions), batch_size=share * partitions, partitions=partitions, **rest
    ),
    sizes=st.lists(st.integers(0, 40), max_size=12),
    share=st.integers(1, 4),
    partitions=st.sampled_from([1, 2, 3, 4, 8, 12]),
    window=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
)


@settings(max_examples=150, deadline=None)
@given(order=orders, epoch=st.integers(0, 1000))
def test_an_epoch_serves_each_sample_once(order: Order, epoch: int) -> None:
    total, batch = sum(order.sizes), order.batch_size
    steps = steps_per_epoch(total, batch, order.partitions)
    assert steps == order.steps == total // batch
    served = np.concatenate(
        [
            global_batch(
                order.sizes, seed=order.seed, epoch=epoch, step=step, batch_size=batch,
                partitions=order.partitions, window=order.window,
            )
            for step in range(steps)
        ]
    )  # fmt: skip
    assert served.dtype == np.int64
    assert len(served) == steps * batch == len(set(served.tolist()))
    assert served.min() >= 0
    assert served.max() < total
    everything = [partition_order(order, epoch, p) for p in range(order.partitions)]
    assert sorted(np.concatenate(everything).tolist()) == list(range(total))


@settings(max_examples=150, deadline=None)
@given(order=orders, epoch=st.integers(0, 50), data=st.data())
def test_any_world_size_serves_the_same_global_batch(order: Order, epoch: int, data) -> None:
    world = data.draw(
        st.sampled_from([w for w in range(1, order.partitions + 1) if order.partitions % w == 0])
    )
    share = order.batch_size // world
    micro = data.draw(st.sampled_from([m for m in range(1, share + 1) if share % m == 0]))
    step = data.draw(st.integers(0, order.steps - 1))
    whole = order.samples(epoch, step, 0, order.batch_size)[0]
    pieces = [
        order.samples(epoch, step, first, first + micro)[0]
        for rank in range(world)
        for first in range(rank * share, (rank + 1) * share, micro)
    ]
    assert np.array_equal(np.concatenate(pieces), whole)


@settings(max_examples=100, deadline=None)
@given(order=orders, epoch=st.integers(0, 50), world=st.sampled_from([1, 2, 3, 4]))
def test_ranks_share_few_shards_and_windows_stay_together(order, epoch, world) -> None:
    if order.partitions % world:
        world = 1
    starts = np.cumsum([0, *order.sizes])
    touched = []
    for rank in range(world):
        numbers = range(rank * order.partitions // world, (rank + 1) * order.partitions // world)
        samples = np.concatenate([partition_order(order, epoch, n) for n in numbers])
        touched.append(set(np.searchsorted(starts, samples, side="right").tolist()))
    filled = sum(size > 0 for size in order.sizes)
    # Cutting a row of shards into `world` stretches cuts at most world - 1 of them (each at most
    # twice or more only where it is longer than a stretch).
    assert sum(map(len, touched)) <= filled + world - 1
    assert set.union(*touched) == {s + 1 for s, size in enumerate(order.sizes) if size}
    # While a partition is read, at most `window` shards are open at a time.
    samples = partition_order(order, epoch, 0)
    seen = np.searchsorted(starts, samples, side="right").tolist()
    spans = [(seen.index(s), len(seen) - seen[::-1].index(s)) for s in set(seen)]
    for place in range(len(seen)):
        assert sum(begin <= place < end for begin, end in spans) <= order.window


def test_order_depends_on_seed_and_epoch_and_leaves_out_others() -> None:
    order = Order((50,) * 10, seed=1, batch_size=32, partitions=8, window=3)
    first = [partition_order(order, epoch, 0).tolist() for epoch in range(3)]
    other = partition_order(Order((50,) * 10, 2, 32, 8, 3), 0, 0).tolist()
    assert len({tuple(x) for x in [*first, other]}) == 4
    left = [
        set(range(500)) - set(np.concatenate([order.samples(e, s, 0, 32)[0] for s in range(15)]))
        for e in range(3)
    ]
    assert [len(x) for x in left] == [20] * 3
    assert left[0] != left[1] != left[2]


def test_shuffle_has_no_order_left() -> None:
    """Inside a window the rank correlation of place and sample number is that of chance."""
    order = Order((4000,), seed=5, batch_size=8, partitions=2, window=1)
    served = partition_order(order, 0, 0)
    correlation = np.corrcoef(np.arange(len(served)), served)[0, 1]
    assert abs(correlation) < 5 / np.sqrt(len(served))


def test_random_bits_are_those_of_a_fresh_philox() -> None:
    for case in [(0, 0, 0, 0), (2**63 - 1, 7, 3, 2**40), (5, 2**31, 1, 9)]:
        seed, epoch, stream, number = case
        fresh = np.random.Philox(
            key=np.array([seed, epoch], np.uint64),
            counter=np.array([0, 0, number, stream], np.uint64),
        )
        assert np.array_equal(random_bits(*case, 23), fresh.random_raw(23))


@settings(max_examples=60, deadline=None)
@given(order=orders, epoch=st.integers(0, 2**40), data=st.data())
def test_any_piece_of_a_partition_is_that_of_the_whole(order: Order, epoch: int, data) -> None:
    """Asked for in any order, windows computed apart serve what a shuffle at once would."""
    number = data.draw(st.integers(0, order.partitions - 1))
    whole = reference(order, epoch, number)
    assert partition_order(order, epoch, number).tolist() == whole
    for _ in range(6):
        places = np.array(data.draw(st.lists(st.integers(0, 2 * len(whole)), min_size=1)))
        samples, keys = order.places(epoch, number, places)
        assert samples.tolist() == keys.tolist() == [whole[p % len(whole)] for p in places]
        step = data.draw(st.integers(0, order.steps - 1))
        share = order.batch_size // order.partitions
        served, keys = order.samples(epoch, step, number * share, (number + 1) * share)
        assert served.tolist() == keys.tolist() == whole[step * share : (step + 1) * share]
        assert served.dtype == keys.dtype == np.int64


def test_the_global_batches_of_a_seed_never_change() -> None:
    """A run is resumed by its step alone, by any later version of this code too."""
    batch = global_batch((7, 0, 5, 11, 9, 8) * 9, seed=3, epoch=2, step=5, batch_size=16,
                         partitions=4, window=2)  # fmt: skip
    assert batch.tolist() == [
        72,
        120,
        74,
        77,
        166,
        160,
        150,
        147,
        274,
        220,
        221,
        277,
        6,
        238,
        3,
        239,
    ]
    drawn = Order((30, 20), seed=1, batch_size=8, partitions=4, draws=64).samples(3, 6, 0, 8)
    assert drawn[0].tolist() == [37, 41, 7, 22, 45, 27, 26, 34]
    assert drawn[1].tolist() == [12, 13, 28, 29, 44, 45, 60, 61]


@pytest.mark.parametrize("skip", [0, 1, 3, 4, 5, 1000, 4 * 2**40 + 2])
def test_a_stream_is_entered_anywhere(skip: int) -> None:
    if skip < 2000:
        whole = random_bits(7, 3, 1, 5, 2000)
        assert np.array_equal(random_bits(7, 3, 1, 5, 9, skip), whole[skip:][:9])
    a, b = random_bits(7, 3, 1, 5, 9, skip), random_bits(7, 3, 1, 5, 8, skip + 1)
    assert np.array_equal(a[1:], b)


def test_equal_random_numbers_keep_their_order() -> None:
    """Two of 2**64 that are equal never happen, but must not depend on the sort."""
    noise = np.random.default_rng(0).integers(0, 50, 5000).astype(np.uint64)
    expected = np.argsort(noise, kind="stable")
    assert np.array_equal(order_module._stable_argsort(noise), expected)


def test_a_step_of_two_thousand_million_samples_costs_a_window() -> None:
    """100 bytes a shard and 8 windows of 8 shards, not 16 GB; the last step as the first."""
    order = Order(np.full(200_000, 10_000), 0, 4096, partitions=64, window=8)
    assert order.steps == 2 * 10**9 // 4096
    tracemalloc.start()
    for step in (0, order.steps - 1, order.steps // 2):
        samples, _ = order.samples(5, step, 0, 512)  # the share of one of eight ranks
        assert len(set(samples.tolist())) == 512
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    windows = 8 * 2 * 8 * 10_000 * 4  # partitions, two each, shards, samples, bytes
    assert held < windows + 200_000 * 40
    assert peak < held + 30e6
    assert len(pickle.dumps(order)) < 200_000 * 8 + 1000


def test_more_samples_than_32_bits_can_number() -> None:
    order = Order(np.full(2**20, 9000), 0, 512, partitions=512, window=1)
    assert order.total > 2**32
    samples, _ = order.samples(0, 3, 0, 512)
    assert samples.min() >= 0
    assert 2**32 < samples.max() < order.total
    shards = samples // 9000  # one window of one shard each, as the permutation has them
    row = order.shard_order(0)[0]
    bounds = np.arange(512) * order.total // 512
    assert shards.tolist() == row[bounds // 9000].tolist()


def test_two_epochs_are_remembered() -> None:
    """The loader asks for this epoch's shards and the next one's in turn."""
    order = Order(np.full(9, 4), 0, 4, 2, 2)
    first, second = order.shard_order(3), order.shard_order(4)
    assert order.shard_order(3) is first
    assert order.shard_order(4) is second
    assert order.shard_order(5)[0].tolist() != second[0].tolist()
    assert len(order._epoch) == 2
