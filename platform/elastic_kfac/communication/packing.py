"""Symmetric tensors as triangles, and many tensors in few flat buffers.

The packed layout is the one of Osawa et al. (CVPR 2019): element (r, c) of the lower triangle, c <= r,
lies at r (r + 1) / 2 + c, so an n x n matrix takes n (n + 1) / 2 elements. Leading dimensions are
batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from elastic_kfac.communication.collectives import Communicator, Work
from elastic_kfac.errors import UsageError

DEFAULT_BUCKET_BYTES = 25 * 2**20
_CACHED_WIDTH = 2048


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
            "only square matrices have triangles", given=f"shape {tuple(matrix.shape)}"
        )
    return int(matrix.shape[-1])


def _index(n: int, device: torch.device, *, unpack: bool) -> Tensor:
    # 32-bit: half the memory of the default, and faster. Wide ones are not kept (the two indices of a
    # 4608 wide factor are 127 MB) and cost little beside the decomposition of such a factor.
    build = _cached_index if n <= _CACHED_WIDTH else _build_index
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


@dataclass
class _Bucket:
    """Tensors that will travel together: one operation, source, dtype and device."""

    src: int | None
    tensors: list[Tensor] = field(default_factory=list)
    symmetric: list[bool] = field(default_factory=list)
    num_elements: int = 0


class Bucketer:
    """Sends many tensors of one communicator in few flat buffers, asynchronously.

    A bucketer belongs to one communicator, so groups of equal size never share a bucket. All members
    add tensors of the same shapes in the same order. A bucket is sent as soon as the next tensor would
    take it beyond `cap_bytes`; `flush()` sends the rest. Tensors are read when their bucket is sent and
    written when the flushed work is waited for: in between the caller leaves them alone. A dense tensor
    that is alone in its bucket is sent where it lies.

    Args:
        communicator: among whom.
        tag: under which the traffic is counted.
        cap_bytes: largest bucket; a larger tensor has a bucket of its own. 0 gives every tensor one.
        reduce: replaces the communicator's all-reduce of a flat buffer (another algorithm, a
            compressed wire format).
    """

    def __init__(
        self,
        communicator: Communicator,
        *,
        tag: str,
        cap_bytes: int = DEFAULT_BUCKET_BYTES,
        reduce: Callable[[Tensor, str], Work] | None = None,
    ) -> None:
        self._communicator = communicator
        self._tag = tag
        self._cap_bytes = cap_bytes
        self._reduce = reduce
        self._open: dict[tuple[int | None, torch.dtype, torch.device], _Bucket] = {}
        self._sent: list[Callable[[], None]] = []

    def all_reduce(self, tensor: Tensor, *, symmetric: bool = False) -> None:
        """Sum `tensor` over the ranks, in place; only its lower triangles travel if symmetric."""
        self._add(None, tensor, symmetric)

    def broadcast(self, tensor: Tensor, src: int, *, symmetric: bool = False) -> None:
        """Copy rank `src`'s `tensor` into `tensor` everywhere."""
        self._add(src, tensor, symmetric)

    def flush(self) -> Work:
        """Send what is left; the work completes, and writes, everything added since the last flush."""
        for bucket in self._open.values():
            self._send(bucket)
        self._open = {}
        sent, self._sent = self._sent, []

        def finish() -> None:
            for unpack in sent:
                unpack()

        return Work(finish=finish)

    def _add(self, src: int | None, tensor: Tensor, symmetric: bool) -> None:
        elements = tensor.numel()
        if symmetric:
            n = _width(tensor)
            elements = elements // (n * n) * triangle_size(n) if n else 0
        if elements == 0 or self._communicator.world_size == 1:
            return
        key = (src, tensor.dtype, tensor.device)
        bucket = self._open.get(key)
        if bucket is not None and (
            (bucket.num_elements + elements) * tensor.element_size() > self._cap_bytes
        ):
            self._send(self._open.pop(key))
            bucket = None
        if bucket is None:
            bucket = self._open[key] = _Bucket(src)
        bucket.tensors.append(tensor)
        bucket.symmetric.append(symmetric)
        bucket.num_elements += elements

    def _send(self, bucket: _Bucket) -> None:
        first = bucket.tensors[0]
        if len(bucket.tensors) == 1 and not bucket.symmetric[0] and first.is_contiguous():
            self._sent.append(self._start(first.view(-1), bucket.src).wait)
            return
        flat = first.new_empty(bucket.num_elements)
        parts = _parts(flat, bucket)
        if bucket.src in (None, self._communicator.rank):
            for tensor, symmetric, part in zip(
                bucket.tensors, bucket.symmetric, parts, strict=True
            ):
                if symmetric:
                    pack_triangle(tensor, out=part)
                else:
                    part.view(tensor.shape).copy_(tensor)
        work = self._start(flat, bucket.src)

        def finish() -> None:
            work.wait()
            if bucket.src == self._communicator.rank:
                return
            for tensor, symmetric, part in zip(
                bucket.tensors, bucket.symmetric, parts, strict=True
            ):
                if symmetric:
                    unpack_triangle(part, tensor.shape[-1], out=tensor)
                else:
                    tensor.copy_(part.view(tensor.shape))

        self._sent.append(finish)

    def _start(self, flat: Tensor, src: int | None) -> Work:
        if src is not None:
            return self._communicator.broadcast(flat, src, tag=self._tag, async_op=True)
        if self._reduce is not None:
            return self._reduce(flat, self._tag)
        return self._communicator.all_reduce(flat, tag=self._tag, async_op=True)


def _parts(flat: Tensor, bucket: _Bucket) -> list[Tensor]:
    """Views of the flat buffer, one per tensor: [matrices, triangle] or [elements]."""
    parts, start = [], 0
    for tensor, symmetric in zip(bucket.tensors, bucket.symmetric, strict=True):
        if symmetric:
            n = tensor.shape[-1]
            shape = (*tensor.shape[:-2], triangle_size(n))
        else:
            shape = (tensor.numel(),)
        size = 1
        for extent in shape:
            size *= extent
        parts.append(flat[start : start + size].view(shape))
        start += size
    return parts
