"""K-FAC's statistics as a value: what passes add up, what a reduction makes of it, as one vector.

The preconditioner reduces its own statistics. Who wants to reduce them in another way (a fixed
summation tree) takes the sums of each pass with `KFAC.take_statistics`, packs them next to other
things, and hands the reduced ones to `KFAC.step(statistics=...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_kfac.communication.packing import pack_triangle, triangle_size, unpack_triangle
from elastic_kfac.curvature.block import Block
from elastic_kfac.curvature.factors import finite_sums

_LIMBS = 3
_LIMB_BITS = 12
"""Sums of so small numbers over 4,096 leaves are exact in float32."""


@dataclass(frozen=True)
class Statistics:
    """Sums by block, in the order of `KFAC.blocks`."""

    sums: list[dict[str, Tensor]]
    counts: list[tuple[float, float]]
    """(samples, rows) of each block."""


def take_statistics(
    blocks: Sequence[Block], num_samples: int | None, loss_scale: float | None, extra_scale: float
) -> Statistics:
    """Takes the pending sums of one rank out of its blocks, at per-sample scale."""
    counts = [
        (
            float(block.pending.samples if num_samples is None else num_samples),
            float(block.pending.rows),
        )
        for block in blocks
    ]
    return Statistics([b.take_pending(loss_scale, extra_scale) for b in blocks], counts)


def apply_statistics(blocks: Sequence[Block], statistics: Statistics, decay: float) -> int:
    """Moves the running averages by one reduced mean each; returns how many were not finite."""
    sums, counts = statistics.sums, statistics.counts
    seen = [index for index, (_, rows) in enumerate(counts) if rows]
    finite = finite_sums([sums[index] for index in seen])
    for index, good in zip(seen, finite, strict=True):
        if good:
            block = blocks[index]
            block.update_factors(sums[index], block.normalizers(*counts[index]), decay)
    return len(seen) - sum(map(bool, finite))


class StatisticsLayout:
    """Statistics as one vector: lower triangles of the factors' sums, then row counts in limbs."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = tuple(blocks)
        self._factors = [
            (index, name, tuple(shape), not block.is_diagonal(name))
            for index, block in enumerate(self._blocks)
            for name, shape in block.factor_shapes.items()
        ]
        self._sizes = [_size(shape, symmetric) for _, _, shape, symmetric in self._factors]
        self.size = sum(self._sizes) + _LIMBS * len(self._blocks)
        """Elements of the vector."""

    def pack(self, statistics: Statistics, out: Tensor) -> None:
        """Writes one pass's statistics into `out` [size]."""
        begin = 0
        for (index, name, shape, symmetric), size in zip(self._factors, self._sizes, strict=True):
            part, total = out[begin : begin + size], statistics.sums[index][name]
            if symmetric:
                pack_triangle(total, out=part.view(*shape[:-2], triangle_size(shape[-1])))
            else:
                part.view(shape).copy_(total)
            begin += size
        limbs = [
            float((int(rows) >> (_LIMB_BITS * limb)) & ((1 << _LIMB_BITS) - 1))
            for _, rows in statistics.counts
            for limb in range(_LIMBS)
        ]
        out[begin:] = torch.tensor(limbs, dtype=out.dtype)

    def unpack(self, packed: Tensor, num_samples: int) -> Statistics:
        """The statistics in a reduced vector [size], in memory of their own."""
        sums: list[dict[str, Tensor]] = [{} for _ in self._blocks]
        begin = 0
        for (index, name, shape, symmetric), size in zip(self._factors, self._sizes, strict=True):
            part = packed[begin : begin + size]
            if symmetric:
                triangles = part.view(*shape[:-2], triangle_size(shape[-1]))
                sums[index][name] = unpack_triangle(triangles, shape[-1])
            else:
                sums[index][name] = part.view(shape).clone()
            begin += size
        limbs = [int(value) for value in packed[begin:].tolist()]
        counts = [
            (
                float(num_samples),
                float(sum(limbs[_LIMBS * i + j] << (_LIMB_BITS * j) for j in range(_LIMBS))),
            )
            for i in range(len(self._blocks))
        ]
        return Statistics(sums, counts)


def _size(shape: tuple[int, ...], symmetric: bool) -> int:
    matrices = (*shape[:-2], triangle_size(shape[-1])) if symmetric else shape
    size = 1
    for extent in matrices:
        size *= extent
    return size
