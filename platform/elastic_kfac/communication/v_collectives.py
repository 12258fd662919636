"""Reduce-scatter and all-gather with parts of different sizes, one part per rank.

The flat buffer holds the parts in the order of their owners' ranks. `reduce_scatter_v` leaves the sum
of part r at rank r; `all_gather_v` copies every rank's part to all ranks. Together they move the bytes
of one all-reduce, so an owner can precondition in between at no extra gradient traffic (Osawa et al.,
CVPR 2019). No backend implements them; there are three equivalent methods:

    per_owner   one reduce (broadcast) per owner: fewest bytes, one latency per owner
    padded      one reduce_scatter (all_gather) of equal chunks, each as large as the largest part
    fused       one all-reduce of the whole buffer; reduce_scatter_v discards the other parts,
                all_gather_v fills them with zeros first

A rank that owns nothing has a part of size 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import ConfigError, UsageError

VMethod = Literal["per_owner", "padded", "fused"]


def reduce_scatter_v(
    communicator: Communicator,
    flat: Tensor,
    sizes: Sequence[int],
    *,
    method: VMethod = "per_owner",
    tag: str,
) -> Tensor:
    """Sums `flat` [sum(sizes)] over all ranks; rank r gets its part [sizes[r]].

    `flat` is consumed: its content is undefined afterwards, and the result may be a view of it.

    Raises:
        UsageError: If the sizes do not fit the buffer or the ranks.
        ConfigError: If the method is unknown.
        CommunicationError: If a peer left.
    """
    return begin_reduce_scatter_v(communicator, flat, sizes, method=method, tag=tag)()


def begin_reduce_scatter_v(
    communicator: Communicator,
    flat: Tensor,
    sizes: Sequence[int],
    *,
    method: VMethod = "per_owner",
    tag: str,
) -> Callable[[], Tensor]:
    """Starts `reduce_scatter_v`; what is returned waits for its result."""
    starts = _starts(communicator, sizes, method)
    rank, world_size = communicator.rank, communicator.world_size
    if flat.shape != (starts[-1],) or not flat.is_contiguous():
        raise UsageError(
            "reduce_scatter_v needs one flat contiguous buffer",
            given=f"shape {tuple(flat.shape)}",
            allowed=f"[{starts[-1]}]",
        )
    parts = [flat[starts[owner] : starts[owner + 1]] for owner in range(world_size)]
    result = parts[rank]
    if method == "fused":
        works = [communicator.all_reduce(flat, tag=tag, async_op=True)]
    elif method == "per_owner":
        works = [
            communicator.reduce(part, owner, tag=tag, async_op=True)
            for owner, part in enumerate(parts)
        ]
    else:
        padded = flat.new_zeros((world_size, max(sizes)))
        for owner, part in enumerate(parts):
            padded[owner, : len(part)] = part
        chunk = flat.new_empty(max(sizes))
        works = [communicator.reduce_scatter(chunk, padded.view(-1), tag=tag, async_op=True)]
        result = chunk[: sizes[rank]]

    def finish() -> Tensor:
        for work in works:
            work.wait()
        return result

    return finish


def reduce_scatter_half(
    communicator: Communicator,
    parts: Sequence[Tensor],
    sizes: Sequence[int],
    half: torch.dtype,
    *,
    method: VMethod,
    tag: str,
) -> Tensor:
    """`reduce_scatter_v` in half precision, with one scale per part so that no sum overflows.

    Args:
        parts: Flat tensors in owner order, with the same lengths on all ranks.
        sizes: Elements per owner; each is a sum of lengths of whole parts.
        half: `torch.float16` or `torch.bfloat16`.

    Returns:
        The summed parts of this rank, concatenated, in their own precision.
    """
    flat = torch.cat(list(parts)) if parts else torch.zeros(0)
    # The sum of the ranks' largest magnitudes bounds the magnitude of any sum.
    peaks = torch.stack([p.abs().max() if p.numel() else p.new_zeros(()) for p in parts])
    communicator.all_reduce(peaks, tag=f"{tag}/scales")
    room = torch.finfo(half).max / 4
    scales = torch.exp2(torch.floor(torch.log2(room / peaks.clamp(min=1e-30))).clamp(max=126))
    lengths = torch.tensor([p.numel() for p in parts], device=flat.device)
    scaled = (flat * torch.repeat_interleave(scales, lengths)).to(half)
    result = reduce_scatter_v(communicator, scaled, sizes, method=method, tag=tag)
    first = sum(sizes[: communicator.rank])
    ends = torch.cumsum(lengths, 0)
    mine = (ends > first) & (ends <= first + sizes[communicator.rank])
    return result.to(flat.dtype) / torch.repeat_interleave(scales[mine], lengths[mine])


def all_gather_v(
    communicator: Communicator,
    part: Tensor,
    sizes: Sequence[int],
    *,
    method: VMethod = "per_owner",
    tag: str,
) -> Tensor:
    """Collects every rank's part [sizes[r]] into one buffer [sum(sizes)] on all ranks.

    The fused method adds zeros, so it alone turns -0.0 into 0.0.

    Raises:
        UsageError: If the part is not of this rank's size.
        ConfigError: If the method is unknown.
        CommunicationError: If a peer left.
    """
    starts = _starts(communicator, sizes, method)
    rank, world_size = communicator.rank, communicator.world_size
    if part.shape != (sizes[rank],):
        raise UsageError(
            "all_gather_v needs this rank's part as one flat tensor",
            given=f"shape {tuple(part.shape)}",
            allowed=f"[{sizes[rank]}]",
        )
    if method == "padded":
        mine = part.new_zeros(max(sizes))
        mine[: part.numel()] = part
        gathered = part.new_empty((world_size, max(sizes)))
        communicator.all_gather_into(gathered, mine, tag=tag)
        return torch.cat([gathered[owner, :size] for owner, size in enumerate(sizes)])
    flat = part.new_zeros(starts[-1])
    flat[starts[rank] : starts[rank + 1]] = part
    if method == "fused":
        communicator.all_reduce(flat, tag=tag)
        return flat
    works = [
        communicator.broadcast(
            flat[starts[owner] : starts[owner + 1]], owner, tag=tag, async_op=True
        )
        for owner in range(world_size)
    ]
    for work in works:
        work.wait()
    return flat


def _starts(communicator: Communicator, sizes: Sequence[int], method: str) -> list[int]:
    if method not in get_args(VMethod):
        raise ConfigError(
            "unknown V-collective method", given=method, allowed=", ".join(get_args(VMethod))
        )
    if len(sizes) != communicator.world_size or any(size < 0 for size in sizes):
        raise UsageError(
            "a V-collective needs one size per rank",
            given=list(sizes),
            allowed=f"{communicator.world_size} sizes of at least 0",
        )
    return [0, *accumulate(sizes)]


def received_elements(method: VMethod, sizes: Sequence[int]) -> float:
    """Elements that arrive at the busiest rank, by the counting of `counters`."""
    p, total = len(sizes), sum(sizes)
    if p == 1:
        return 0.0
    if method == "fused":
        return 2.0 * (p - 1) / p * total
    if method == "padded":
        return float((p - 1) * max(sizes))
    return float(total - min(sizes))


def cheapest_method(
    sizes: Sequence[int],
    *,
    element_bytes: int,
    latency_s: float,
    seconds_per_byte: float,
) -> VMethod:
    """The way with the least predicted time: latency per call plus bytes at the busiest rank.

    `latency_s` and `seconds_per_byte` come from a calibration on the group in use; they must be the
    same on all ranks, or the ranks would choose differently.
    """

    def seconds(method: VMethod) -> float:
        calls = sum(size > 0 for size in sizes) if method == "per_owner" else 1
        moved = received_elements(method, sizes) * element_bytes
        return calls * latency_s + moved * seconds_per_byte

    methods: tuple[VMethod, ...] = ("per_owner", "padded", "fused")
    return min(methods, key=seconds)
