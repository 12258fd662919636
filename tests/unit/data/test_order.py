"""The global order and the identity hash against a plain-Python oracle and golden values."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_kfac.data.order import (
    SampleOrder,
    id_hash,
    keyed_hash,
    mix64,
    stream_key,
    uniforms,
)
from elastic_kfac.errors import DataError

MASK = (1 << 64) - 1

# Recorded once; a change means that old runs can no longer be resumed or audited.
GOLDEN_FULL = [12, 13, 11, 15, 0, 3, 6, 7, 9, 14, 10, 2, 5, 1, 8, 4]
GOLDEN_BLOCKS = [6, 8, 7, 5, 9, 11, 10, 4, 3, 14, 0, 15, 12, 13, 1, 2]
GOLDEN_HASH = 0x25D2C14153BA24C7
GOLDEN_SLICE_HASH = 0x24848199F43C18DC


def splitmix(value: int) -> int:
    """SplitMix64's output function, in plain integers."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def test_mix64_random_words_equals_plain_integers() -> None:
    words = [random.Random(0).getrandbits(64) for _ in range(200)] + [0, 1, MASK]
    assert mix64(np.array(words, dtype=np.uint64)).tolist() == [splitmix(w) for w in words]


def test_mix64_zero_gives_published_first_output() -> None:
    # The first output of SplitMix64 seeded with 0, as published with the reference generator.
    assert splitmix(0) == 0xE220A8397B1DCDAF == int(mix64(np.zeros(1, dtype=np.uint64))[0])


def test_stream_key_words_equals_plain_fold() -> None:
    key = 0
    for word in (3, 1, 2):
        key = splitmix(key ^ splitmix(word))
    assert stream_key(3, 1, 2) == key
    assert len({stream_key(1, 2), stream_key(2, 1), stream_key(1, 2, 0), stream_key(1)}) == 4


def test_keyed_hash_ids_equals_plain_integers() -> None:
    key = stream_key(7)
    expected = [splitmix(splitmix(i) ^ key) for i in range(50)]
    assert keyed_hash(key, np.arange(50)).tolist() == expected


def test_order_golden_values_do_not_change() -> None:
    assert SampleOrder(16, 0, 0).ids(0, 16).tolist() == GOLDEN_FULL
    blocks = SampleOrder(16, 5, 3, shard_rows=[4, 5, 3, 4], window=6)
    assert blocks.ids(0, 16).tolist() == GOLDEN_BLOCKS
    assert id_hash(np.arange(10)) == GOLDEN_HASH
    assert id_hash(SampleOrder(1000, 1, 2).ids(100, 64)) == GOLDEN_SLICE_HASH


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    window=st.one_of(st.none(), st.integers(1, 200)),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
    data=st.data(),
)
def test_ids_any_cut_tiles_the_epoch_exactly_once(
    rows: list[int], window: int | None, seed: int, epoch: int, data: st.DataObject
) -> None:
    total = sum(rows)
    order = SampleOrder(total, seed, epoch, shard_rows=rows, window=window)
    whole = order.ids(0, total)
    assert sorted(whole.tolist()) == list(range(total))
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=6)))
    edges = [0, *cuts, total]
    pieces = [order.ids(a, b - a) for a, b in itertools.pairwise(edges)]
    random.Random(0).shuffle(pieces_in_any_order := list(enumerate(pieces)))
    again = SampleOrder(total, seed, epoch, shard_rows=rows, window=window)
    for index, piece in pieces_in_any_order:  # Random access, not a replay from the start.
        assert np.array_equal(again.ids(edges[index], len(piece)), piece)
    assert np.array_equal(np.concatenate(pieces), whole)


@settings(max_examples=40, deadline=None)
@given(num_samples=st.integers(1, 400), batch=st.integers(1, 130), data=st.data())
def test_assignment_random_world_changes_every_sample_once(
    num_samples: int, batch: int, data: st.DataObject
) -> None:
    order = SampleOrder(num_samples, 1, 0)
    seen: list[int] = []
    partial = 0
    consumed = 0
    while consumed < num_samples:
        world = data.draw(st.integers(1, 7))
        size = min(batch, num_samples - consumed)
        for rank in range(world):
            low, high = rank * size // world, (rank + 1) * size // world
            ids = order.ids(consumed + low, high - low)
            seen += ids.tolist()
            partial = (partial + id_hash(ids)) & MASK
        consumed += size
    assert sorted(seen) == list(range(num_samples))
    assert partial == id_hash(np.arange(num_samples))


def test_order_other_seed_or_epoch_differs() -> None:
    orders = {tuple(SampleOrder(64, seed, epoch).ids(0, 64)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_order_without_shuffle_is_identity() -> None:
    assert SampleOrder(9, 4, 2, shuffle=False).ids(3, 4).tolist() == [3, 4, 5, 6]


def test_shards_block_order_covers_what_ids_need() -> None:
    rows = [7, 3, 9, 5, 6, 2, 8]
    first = np.cumsum([0, *rows])
    order = SampleOrder(sum(rows), 3, 1, shard_rows=rows, window=11)
    for start in range(0, sum(rows) - 6, 5):
        needed = set(np.searchsorted(first, order.ids(start, 6), side="right") - 1)
        offered = set(order.shards(start, 6).tolist())
        assert needed <= offered < set(range(len(rows)))
        upcoming = order.upcoming_shards(start).tolist()
        assert set(order.shards(start, 1)) <= set(upcoming)
    ends = [order.upcoming_shards(p).tolist() for p in range(sum(rows))]
    assert {len(e) for e in ends} != {len(rows)} and order.upcoming_shards(sum(rows)).size == 0
    plain = SampleOrder(sum(rows), 3, 1, shard_rows=rows, shuffle=False)
    assert plain.upcoming_shards(8).tolist() == [1, 2]
    assert plain.upcoming_shards(sum(rows) - 1).tolist() == [6]
    assert plain.shards(8, 4).tolist() == [1, 2]


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 11), (10, 1), (3, -1)])
def test_ids_outside_epoch_raises(first: int, count: int) -> None:
    with pytest.raises(DataError, match="positions outside the epoch"):
        SampleOrder(10, 0, 0).ids(first, count)


def test_order_rows_that_do_not_add_up_raises() -> None:
    with pytest.raises(DataError, match="do not add up"):
        SampleOrder(10, 0, 0, shard_rows=[4, 5])


def test_id_hash_partial_sums_add_up_in_any_order() -> None:
    ids = np.random.default_rng(0).permutation(5000)
    parts = np.array_split(ids, 13)
    assert sum(id_hash(p) for p in parts) & MASK == id_hash(np.arange(5000))
    assert id_hash(ids[::-1]) == id_hash(ids)
    assert id_hash(ids[:0]) == 0


def test_id_hash_swap_repeat_or_loss_changes_it() -> None:
    ids = np.arange(1000)
    hashes = {id_hash(ids), id_hash(ids[1:]), id_hash(np.append(ids, 5))}
    swapped = ids.copy()
    swapped[[3, 4]] = [2, 5]  # The plain sum of ids would not notice.
    assert len(hashes | {id_hash(swapped)}) == 4


def test_shuffle_full_permutation_has_no_structure() -> None:
    """Rank correlation of position and id, and adjacency, as a random permutation has them."""
    count = 20_000
    ids = SampleOrder(count, 11, 0).ids(0, count)
    correlation = np.corrcoef(np.arange(count), ids)[0, 1]
    assert abs(correlation) < 4 / np.sqrt(count)
    adjacent = int((np.abs(np.diff(ids)) == 1).sum())
    assert adjacent <= 12  # Poisson with mean 2.
    following = SampleOrder(count, 11, 1).ids(0, count)
    assert int((ids == following).sum()) <= 8  # Poisson with mean 1.


def test_shuffle_sorted_classes_batches_mix_like_random_draws() -> None:
    """With ids sorted by class, class counts of batches follow the hypergeometric law."""
    classes = np.repeat(np.arange(10), 1000)
    order = SampleOrder(10_000, 2, 0).ids(0, 10_000)
    batches = classes[order].reshape(-1, 100)
    counts = np.stack([(batches == c).sum(axis=1) for c in range(10)], axis=1)
    expected_variance = 100 * 0.1 * 0.9 * (10_000 - 100) / (10_000 - 1)
    assert 0.85 < counts.var() / expected_variance < 1.15


def test_uniforms_draws_are_uniform_and_by_id_only() -> None:
    draws = uniforms(stream_key(1), np.arange(20_000), 3)
    assert draws.min() >= 0 and draws.max() < 1
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.03
    assert np.array_equal(uniforms(stream_key(1), np.array([17, 4]), 3), draws[[17, 4]])


def test_order_of_imagenet_size_is_small() -> None:
    order = SampleOrder(1_281_167, 0, 0)
    order.ids(1_000_000, 256)
    held = sum(block.nbytes for block in order._shuffled.values())
    assert held == 4 * 1_281_167


def displacement(ids: np.ndarray) -> float:
    """Mean distance between a sample's place and its id, as a share of the epoch."""
    return float(np.abs(np.arange(len(ids)) - ids).mean() / len(ids))


def class_runs(classes: np.ndarray) -> int:
    """How many maximal runs of one class an order has."""
    return 1 + int((classes[1:] != classes[:-1]).sum())


ROWS = [1000] * 40
"""A set of 40 shards; with a window of 5,000 a cache needs to hold a quarter of it at most."""


def test_shuffle_blocks_displace_samples_like_a_full_permutation() -> None:
    """A permutation moves a sample by a third of the epoch on average, with deviation 0.236.

    Blocks move the 1,000 samples of a shard together, so an epoch has 40 independent draws of that
    distance instead of 40,000; over 40 epochs their mean is the same third.
    """
    total = sum(ROWS)
    full = displacement(SampleOrder(total, 4, 0).ids(0, total))
    assert abs(full - 1 / 3) < 4 * 0.236 / np.sqrt(total)
    blocks = [
        displacement(SampleOrder(total, 4, e, shard_rows=ROWS, window=5000).ids(0, total))
        for e in range(40)
    ]
    assert abs(np.mean(blocks) - 1 / 3) < 4 * 0.236 / np.sqrt(40 * 40)
    # What a shuffle buffer of the same memory does: nothing moves further than the buffer.
    buffered = np.concatenate(
        [np.random.default_rng(0).permutation(5000) + b for b in range(0, total, 5000)]
    )
    assert displacement(buffered) < 0.05


def test_shuffle_blocks_of_mixed_shards_have_as_many_class_runs_as_a_permutation() -> None:
    """Shards are cut from a shuffled source, so a block is a fair sample of the classes."""
    total = sum(ROWS)
    classes = np.random.default_rng(1).permutation(np.repeat(np.arange(100), total // 100))
    order = SampleOrder(total, 6, 2, shard_rows=ROWS, window=5000).ids(0, total)
    # Neighbours of a random order agree with probability (m - 1) / (n - 1).
    same = (total // 100 - 1) / (total - 1)
    expected, deviation = 1 + (total - 1) * (1 - same), np.sqrt(total * same * (1 - same))
    assert abs(class_runs(classes[order]) - expected) < 4 * deviation
    # Batches of 256 hold each class as often as random draws do.
    batches = classes[order][: total // 256 * 256].reshape(-1, 256)
    counts = np.stack([(batches == c).sum(axis=1) for c in range(100)])
    assert 0.93 < counts.var() / (256 * 0.01 * 0.99) < 1.07


def test_shuffle_blocks_of_sorted_shards_show_what_the_window_cannot_mix() -> None:
    """The statistic can fail: with one class per shard a block holds few classes."""
    total = sum(ROWS)
    classes = np.repeat(np.arange(40), 1000)
    order = SampleOrder(total, 6, 2, shard_rows=ROWS, window=5000).ids(0, total)
    batches = classes[order][: total // 256 * 256].reshape(-1, 256)
    assert max(len(set(batch.tolist())) for batch in batches[:: len(batches) // 8]) <= 12
    full = SampleOrder(total, 6, 2).ids(0, total)
    assert len(set(classes[full][:256].tolist())) > 35
    # Class by class within the epoch, runs are still as short as five classes at a time allow.
    assert class_runs(classes[order]) > 0.75 * total


def test_shuffle_blocks_neighbours_of_one_epoch_part_in_the_next() -> None:
    total = sum(ROWS)
    place = np.empty((2, total), dtype=np.int64)
    for epoch in (0, 1):
        ids = SampleOrder(total, 4, epoch, shard_rows=ROWS, window=5000).ids(0, total)
        place[epoch, ids] = np.arange(total)
    near = np.flatnonzero(np.abs(np.diff(place[0])) <= 2)
    still_near = (np.abs(np.diff(place[1]))[near] <= 2).mean()
    # Both ids of a pair lie in one shard, so in one block of 5,000: 4 places of about 5,000.
    assert still_near < 0.01
