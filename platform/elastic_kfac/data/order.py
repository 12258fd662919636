"""The sample order of an epoch, and hashes of sample ids.

Everything here is a pure function of integers, computed by a counter-based hash of our own: a library's
permutations may change between versions, and the order of a resumed run must not. Golden values in the
tests pin it. Arithmetic is modulo 2^64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from elastic_kfac.errors import DataError

UInt64Array = NDArray[np.uint64]
Int64Array = NDArray[np.int64]

_MASK: Final = (1 << 64) - 1
_STEP: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
_IDENTITY_KEY: Final = 0x5A3C_96D1_7E44_B02F

# Purposes of draws: two purposes never share a stream.
SHARD_ORDER: Final = 1
SAMPLE_ORDER: Final = 2
AUGMENTATION: Final = 3
SOURCE_SHUFFLE: Final = 4


def mix64(values: UInt64Array) -> UInt64Array:
    """Bijective 64-bit mixer (SplitMix64; Steele, Lea and Flood 2014, figure 17)."""
    values = values + np.uint64(_STEP)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))


def stream_key(*words: int) -> int:
    """Folds integers (seed, epoch, purpose, …) into one 64-bit key; their order matters."""
    key = np.zeros(1, dtype=np.uint64)
    for word in words:
        key = mix64(key ^ mix64(np.array([word & _MASK], dtype=np.uint64)))
    return int(key[0])


def keyed_hash(key: int, counters: NDArray[np.integer]) -> UInt64Array:
    """One 64-bit value per counter; the same counter under another key is unrelated."""
    return mix64(mix64(np.asarray(counters).astype(np.uint64)) ^ np.uint64(key))


def uniforms(key: int, counters: NDArray[np.integer], draws: int) -> NDArray[np.float64]:
    """`draws` numbers in [0, 1) per counter, [len(counters), draws], with 53 random bits each."""
    roots = keyed_hash(key, counters)[:, None]
    steps = np.arange(1, draws + 1, dtype=np.uint64)[None, :] * np.uint64(_STEP)
    bits = mix64(roots + steps)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def id_hash(ids: NDArray[np.integer]) -> int:
    """Order-free hash of a multiset of sample ids: the sum modulo 2^64 of a mix of each.

    It is additive, `id_hash(a + b) == (id_hash(a) + id_hash(b)) mod 2^64`, so partial hashes of
    ranks and micro-batches add up to the hash of a step.
    """
    return int(keyed_hash(_IDENTITY_KEY, np.asarray(ids)).sum(dtype=np.uint64))


def permutation(key: int, ids: Int64Array) -> Int64Array:
    """`ids` sorted by their keyed hash: a pseudorandom permutation determined by `key`."""
    return ids[np.argsort(keyed_hash(key, ids), kind="stable")]


class SampleOrder:
    """The order of one epoch: position -> sample id, without state.

    Shards are permuted, cut into blocks of at least `window` samples, and every block is shuffled
    completely. Without a window there is one block: a full permutation. Blocks are made of whole
    shards because a shard is what a node's cache holds: only the shards of one or two blocks
    are needed at a time, however large the set.

    Args:
        num_samples: Samples of the set; ids are 0 … num_samples - 1.
        seed: Seed of the run.
        epoch: From 0.
        shard_rows: Rows of every shard, in id order; None means one shard.
        window: Minimum samples per block; None is a full permutation.
        shuffle: False gives position == id.

    Raises:
        DataError: If the shard rows do not add up to `num_samples`.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        epoch: int,
        *,
        shard_rows: Sequence[int] | None = None,
        window: int | None = None,
        shuffle: bool = True,
    ) -> None:
        rows = np.asarray([num_samples] if shard_rows is None else shard_rows, dtype=np.int64)
        if int(rows.sum()) != num_samples or num_samples < 0:
            raise DataError(
                "shard rows do not add up to the samples of the set",
                given=f"{int(rows.sum())} rows",
                allowed=f"{num_samples}",
            )
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = epoch
        self.shuffle = shuffle
        self._sample_key = stream_key(seed, epoch, SAMPLE_ORDER)
        self._shard_rows = rows
        self._shard_first = np.concatenate([[0], np.cumsum(rows)[:-1]]).astype(np.int64)
        if window is None or window >= num_samples:
            self._blocks = [np.arange(len(rows), dtype=np.int64)]
        else:
            key = stream_key(seed, epoch, SHARD_ORDER)
            shards = permutation(key, np.arange(len(rows), dtype=np.int64))
            self._blocks = _cut(shards, rows, window)
        sizes = [int(rows[block].sum()) for block in self._blocks]
        self._block_first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._shuffled: dict[int, NDArray[np.integer]] = {}

    def ids(self, first: int, count: int) -> Int64Array:
        """Sample ids at positions [first, first + count).

        Raises:
            DataError: If the range leaves the epoch; an epoch is never padded.
        """
        if first < 0 or count < 0 or first + count > self.num_samples:
            raise DataError(
                "positions outside the epoch",
                given=f"[{first}, {first + count})",
                allowed=f"[0, {self.num_samples})",
            )
        if not self.shuffle or count == 0:
            return np.arange(first, first + count, dtype=np.int64)
        parts = []
        for block in self._blocks_between(first, first + count):
            start = int(self._block_first[block])
            order = self._block_order(block)
            parts.append(order[max(first - start, 0) : first + count - start])
        return np.concatenate(parts).astype(np.int64)

    def shards(self, first: int, count: int) -> Int64Array:
        """Indices of the shards that positions [first, first + count) may need, in fetch order."""
        if count <= 0:
            return np.zeros(0, dtype=np.int64)
        if not self.shuffle:
            low = np.searchsorted(self._shard_first, first, side="right") - 1
            high = np.searchsorted(self._shard_first, first + count, side="left")
            return np.arange(low, high, dtype=np.int64)
        blocks = self._blocks_between(first, first + count)
        return np.concatenate([self._blocks[block] for block in blocks])

    def upcoming_shards(self, position: int) -> Int64Array:
        """Shards of the block at `position` and of the next one, in fetch order.

        Without shuffling a block is a shard.
        """
        if not 0 <= position < self.num_samples:
            return np.zeros(0, dtype=np.int64)
        if not self.shuffle:
            shard = int(np.searchsorted(self._shard_first, position, side="right")) - 1
            return np.arange(shard, min(shard + 2, len(self._shard_rows)), dtype=np.int64)
        block = self._blocks_between(position, position + 1)[0]
        return np.concatenate(self._blocks[block : block + 2])

    def _blocks_between(self, first: int, stop: int) -> range:
        low = int(np.searchsorted(self._block_first, first, side="right")) - 1
        high = int(np.searchsorted(self._block_first, stop, side="left"))
        return range(low, high)

    def _block_order(self, block: int) -> NDArray[np.integer]:
        order = self._shuffled.get(block)
        if order is None:
            members = [
                np.arange(self._shard_first[s], self._shard_first[s] + self._shard_rows[s])
                for s in self._blocks[block]
            ]
            order = permutation(self._sample_key, np.concatenate(members).astype(np.int64))
            if self.num_samples < 1 << 31:
                order = order.astype(np.int32)
            while len(self._shuffled) > 1:  # A batch spans at most a block and its successor.
                self._shuffled.pop(next(iter(self._shuffled)), None)
            self._shuffled[block] = order
        return order


def _cut(shards: Int64Array, rows: Int64Array, window: int) -> list[Int64Array]:
    blocks: list[Int64Array] = []
    first = filled = 0
    for index, shard in enumerate(shards):
        filled += int(rows[shard])
        if filled >= window:
            blocks.append(shards[first : index + 1])
            first, filled = index + 1, 0
    if first < len(shards):
        # A short tail would be a poorly shuffled end of every epoch: the last block absorbs it.
        tail = shards[first:]
        if blocks and filled * 2 < window:
            blocks[-1] = np.concatenate([blocks[-1], tail])
        else:
            blocks.append(tail)
    return blocks
