"""Unequal shares: what ranks of different speeds do so that all end at about the same time.

A share is a number of equal pieces of work, samples or logical shards. Sums and counts travel, not means,
so that any shares give the mean over the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

_UNITS = 64


def shares(count: int, speeds: Sequence[float]) -> list[range]:
    """Contiguous ranges of `count` pieces, by rank, for which the largest of pieces / speed is least."""
    total = sum(speeds)
    sizes = [int(count * speed / total) for speed in speeds]
    for _ in range(count - sum(sizes)):
        ends = [(size + 1) / speed for size, speed in zip(sizes, speeds, strict=True)]
        sizes[ends.index(min(ends))] += 1
    stops = list(accumulate(sizes))
    return [range(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def slowness(speeds: Sequence[float]) -> list[int]:
    """Time per unit of work, by rank, in whole numbers: 1 for all where all are equally fast."""
    fastest = max(speeds)
    if min(speeds) == fastest:
        return [1] * len(speeds)
    return [round(_UNITS * fastest / speed) for speed in speeds]
