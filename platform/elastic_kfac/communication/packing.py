"""Symmetric tensors as packed triangles, and many tensors in few flat buffers.

The packed layout follows Osawa et al. (CVPR 2019): element (r, c) of the lower triangle, c <= r, lies at
r (r + 1) / 2 + c, so an n x n matrix takes n (n + 1) / 2 elements. Leading dimensions are batches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from elastic_kfac.communication.collectives import Communicator, Work
from elastic_kfac.errors import UsageError

DEFAULT_BUCKET_BYTES = 25 * 2**20
CACHED_WIDTH = 2048
"""Widest matrices whose indices are kept."""


def triangle_size(n: int) -> int:
    """Elements of the packed lower triangle of an n x n matrix."""
    return n * (n + 1) // 2


def pack_triangle(matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """The lower triangles of symmetric `matrix` [..., n, n], packed [..., n (n + 1) / 2]."""
    n = _width(matrix)
    size = triangle_size(n)
    if out is None:
        out = matrix.new_empty((*matrix.shape[:-2], size))
    rows = matrix.reshape(-1, n * n)
    index = _index(n, matrix.device, unpack=False)
    for row, target in zip(rows, out.view(-1, size), strict=True):
        torch.index_select(row, 0, index, out=target)
    return out


def unpack_triangle(packed: Tensor, n: int, out: Tensor | None = None) -> Tensor:
    """The symmetric matrices [..., n, n] of packed triangles [..., n (n + 1) / 2]."""
    size = triangle_size(n)
    if packed.shape[-1:] != (size,):
        raise UsageError(
            "not the packed triangle of a matrix of this width",
            given=f"shape {tuple(packed.shape)} for width {n}",
            allowed=f"[..., {size}]",
        )
    if out is None:
        out = packed.new_empty((*packed.shape[:-1], n, n))
    target = out if out.is_contiguous() else torch.empty_like(out).contiguous()
    index = _index(n, packed.device, unpack=True)
    for row, matrix in zip(packed.reshape(-1, size), target.view(-1, n * n), strict=True):
        torch.index_select(row, 0, index, out=matrix)
    if target is not out:
        out.copy_(target)
    return out


def _width(matrix: Tensor) -> int:
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise UsageError(
            "only a square matrix can be packed as a triangle", given=f"shape {tuple(matrix.shape)}"
        )
    return int(matrix.shape[-1])


def _index(n: int, device: torch.device, *, unpack: bool) -> Tensor:
    # int32 takes half the memory of the default and is faster. Wide indices are not cached (two of them
    # for a 4608-wide factor are 127 MB); building one costs little compared with the decomposition.
    build = _cached_index if n <= CACHED_WIDTH else _build_index
    return build(n, device, unpack)


def _build_index(n: int, device: torch.device, unpack: bool) -> Tensor:
    if not unpack:
        row, column = torch.tril_indices(n, n, device=device, dtype=torch.int32)
        return row * n + column
    position = torch.arange(n, device=device, dtype=torch.int32)
    high = torch.maximum(position[:, None], position[None, :])
    low = torch.minimum(position[:, None], position[None, :])
    return (high * (high + 1) // 2 + low).reshape(-1)


_cached_index = lru_cache(maxsize=128)(_build_index)


@dataclass(frozen=True)
class _Piece:
    """A tensor that travels in a bucket, as triangles or as it is."""

    tensor: Tensor
    symmetric: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the bucket: [..., triangle] or [elements]."""
        if self.symmetric:
            return (*self.tensor.shape[:-2], triangle_size(_width(self.tensor)))
        return (self.tensor.numel(),)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def pack(self, part: Tensor) -> None:
        if self.symmetric:
            pack_triangle(self.tensor, out=part)
        else:
            part.view(self.tensor.shape).copy_(self.tensor)

    def unpack(self, part: Tensor) -> None:
        if self.symmetric:
            unpack_triangle(part, self.tensor.shape[-1], out=self.tensor)
        else:
            self.tensor.copy_(part.view(self.tensor.shape))


class Bucketer:
    """Sends many tensors of one communicator in few flat buffers, asynchronously.

    All members add tensors of the same shapes in the same order. A bucket is sent as soon as the next
    tensor would take it beyond `cap_bytes`; `flush()` sends the rest. Tensors are read when their bucket
    is sent and written when the flushed work is waited for; do not touch them in between. A dense
    contiguous tensor that is alone in its bucket is sent without a copy.

    Args:
        communicator: The ranks. Groups of equal size never share a bucket.
        cap_bytes: Largest bucket; a larger tensor has a bucket of its own. 0 gives every tensor one.
    """

    def __init__(
        self,
        communicator: Communicator,
        *,
        tag: str,
        cap_bytes: int = DEFAULT_BUCKET_BYTES,
    ) -> None:
        self._communicator = communicator
        self._tag = tag
        self._cap_bytes = cap_bytes
        self._open: dict[tuple[int | None, torch.dtype, torch.device], list[_Piece]] = {}
        self._open_elements: Counter[tuple[int | None, torch.dtype, torch.device]] = Counter()
        self._sent: list[Callable[[], None]] = []

    def all_reduce(self, tensor: Tensor, *, symmetric: bool = False) -> None:
        """Sums `tensor` over the ranks, in place; only its lower triangles travel if symmetric."""
        self._add(None, _Piece(tensor, symmetric))

    def broadcast(self, tensor: Tensor, src: int, *, symmetric: bool = False) -> None:
        """Copies rank `src`'s `tensor` into `tensor` on all ranks."""
        self._add(src, _Piece(tensor, symmetric))

    def flush(self) -> Work:
        """Sends the open buckets; the work completes everything added since the last flush."""
        for (src, _, _), bucket in self._open.items():
            self._send(src, bucket)
        self._open = {}
        self._open_elements.clear()
        sent, self._sent = self._sent, []

        def finish() -> None:
            for unpack in sent:
                unpack()

        return Work(finish=finish)

    def _add(self, src: int | None, piece: _Piece) -> None:
        elements = piece.elements
        if elements == 0 or self._communicator.world_size == 1:
            return
        tensor = piece.tensor
        key = (src, tensor.dtype, tensor.device)
        together = self._open_elements[key] + elements
        if key in self._open and together * tensor.element_size() > self._cap_bytes:
            self._send(src, self._open.pop(key))
            together = elements
        self._open.setdefault(key, []).append(piece)
        self._open_elements[key] = together

    def _send(self, src: int | None, bucket: list[_Piece]) -> None:
        first = bucket[0]
        if len(bucket) == 1 and not first.symmetric and first.tensor.is_contiguous():
            self._sent.append(self._start(first.tensor.view(-1), src).wait)
            return
        sizes = [piece.elements for piece in bucket]
        flat = first.tensor.new_empty(sum(sizes))
        parts = [
            part.view(piece.shape) for piece, part in zip(bucket, flat.split(sizes), strict=True)
        ]
        if src in (None, self._communicator.rank):
            for piece, part in zip(bucket, parts, strict=True):
                piece.pack(part)
        work = self._start(flat, src)

        def finish() -> None:
            work.wait()
            if src != self._communicator.rank:
                for piece, part in zip(bucket, parts, strict=True):
                    piece.unpack(part)

        self._sent.append(finish)

    def _start(self, flat: Tensor, src: int | None) -> Work:
        if src is None:
            return self._communicator.all_reduce(flat, tag=self._tag, async_op=True)
        return self._communicator.broadcast(flat, src, tag=self._tag, async_op=True)
