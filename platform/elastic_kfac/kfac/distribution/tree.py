"""The canonical tree of the reproducible mode: one order of additions for any number of ranks.

    forward, backward   once per logical shard; gradients AND statistics are one leaf of the tree
    tree                communication/summation_tree.py adds the leaves in a fixed order
                        └─ the same bits on every rank ───────▶ step(statistics=...)
    from there on       as in the KAISA grid

The trainer owns the tree, because gradients and running statistics travel in it too. It takes the sums of
each shard with `KFAC.take_statistics`, writes them into its vector with a `StatisticsLayout`, and hands
the reduced ones to `KFAC.step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from elastic_kfac.communication.packing import pack_triangle, triangle_size, unpack_triangle
from elastic_kfac.curvature.layer import Layer
from elastic_kfac.errors import UsageError
from elastic_kfac.kfac.distribution.grid import KaisaGrid
from elastic_kfac.kfac.statistics import Captured, Coming, Statistics, reduced

_LIMBS = 3
_LIMB_BITS = 12
"""Sums of so small numbers over 4,096 leaves are exact in float32."""


class CanonicalTree(KaisaGrid):
    """The KAISA grid whose statistics arrive reduced."""

    def begin_reduction(self, captured: Captured) -> Coming:
        raise UsageError(
            "step() needs the statistics that the summation tree reduced",
            change="pass statistics=..., or build KFAC without tree=True",
        )


class StatisticsLayout:
    """Statistics as one vector: lower triangles of the factors' sums, then row counts in limbs and the
    flags of faulty layers and of the one called last.

    Args:
        layers: In the order of `KFAC.layers`.
        due: The factors that travel, by layer; None is all.
    """

    def __init__(
        self, layers: Sequence[Layer], due: Sequence[frozenset[str]] | None = None
    ) -> None:
        self._layers = tuple(layers)
        self._parts = [
            (index, name, shape, _packed_shape(shape))
            for index, layer in enumerate(self._layers)
            for name, shape in layer.factor_shapes.items()
            if due is None or name in due[index]
        ]
        self.size = sum(prod(packed) for *_, packed in self._parts)
        self.size += (_LIMBS + 2) * len(self._layers)
        """Elements of the vector."""

    def pack(self, statistics: Statistics, out: Tensor) -> None:
        """Writes one pass's statistics into `out` [size]."""
        begin = 0
        for index, name, shape, packed in self._parts:
            part = out[begin : begin + prod(packed)].view(packed)
            total = statistics.sums[index].get(name)
            if total is None:
                part.zero_()
            elif len(shape) > 1:
                pack_triangle(total, out=part)
            else:
                part.copy_(total)
            begin += prod(packed)
        limbs = [
            float((int(rows) >> (_LIMB_BITS * limb)) & ((1 << _LIMB_BITS) - 1))
            for _, rows in statistics.counts
            for limb in range(_LIMBS)
        ]
        flags = [float(index in statistics.faulty) for index in range(len(self._layers))]
        flags += [float(index == statistics.last_called) for index in range(len(self._layers))]
        out[begin:] = torch.tensor(limbs + flags, dtype=out.dtype)

    def unpack(self, vector: Tensor, num_samples: float) -> Statistics:
        """The statistics in a reduced vector [size], in memory of their own."""
        sums: list[dict[str, Tensor]] = [{} for _ in self._layers]
        begin = 0
        for index, name, shape, packed in self._parts:
            part = vector[begin : begin + prod(packed)].view(packed)
            sums[index][name] = unpack_triangle(part, shape[-1]) if len(shape) > 1 else part.clone()
            begin += prod(packed)
        limbs = [int(value) for value in vector[begin:].tolist()]
        size = len(self._layers)
        flags = limbs[_LIMBS * size :]
        facts = [
            (
                float(num_samples),
                float(sum(limbs[_LIMBS * i + j] << (_LIMB_BITS * j) for j in range(_LIMBS))),
                flags[i],
                flags[size + i],
            )
            for i in range(size)
        ]
        return replace(reduced(facts), sums=sums)


def _packed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:-2], triangle_size(shape[-1])) if len(shape) > 1 else tuple(shape)
