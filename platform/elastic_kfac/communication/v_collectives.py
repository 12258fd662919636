"""Reduce-scatter and all-gather with parts of different sizes, one part per rank.

The flat buffer holds, for each owner in rank order, that owner's part. `reduce_scatter_v` leaves the
sum of part r at rank r; `all_gather_v` brings every rank's part to all. Together they are one
all-reduce in bytes, which is why an owner can precondition in between at no extra gradient traffic
(Osawa et al., CVPR 2019). No backend has them, so there are three ways, which agree:

    per_owner   one reduce (broadcast) per owner: fewest bytes, as many latencies as owners
    padded      one reduce_scatter (all_gather) of equal chunks as large as the largest part
    fused       one all-reduce of the whole buffer, the rest discarded (zero-filled before)

A rank that owns nothing has a part of size 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor

from elastic_kfac.communication.collectives import Communicator, Work
from elastic_kfac.errors import ConfigError, UsageError

VMethod = Literal["per_owner", "padded", "fused"]


class PendingTensor:
    """A tensor that is complete once `wait()` has returned it."""

    def __init__(self, works: Sequence[Work], tensor: Tensor) -> None:
        self._works = works
        self._tensor = tensor

    def wait(self) -> Tensor:
        """The result.

        Raises:
            CommunicationError: a peer left during the collective.
        """
        works, self._works = self._works, ()
        for work in works:
            work.wait()
        return self._tensor


def reduce_scatter_v(
    communicator: Communicator,
    flat: Tensor,
    sizes: Sequence[int],
    *,
    method: VMethod = "per_owner",
    tag: str,
) -> PendingTensor:
    """Start to sum `flat` [sum(sizes)] over all ranks; rank r gets its part [sizes[r]].

    `flat` is used up: its content is undefined afterwards, and the result may be a view of it.

    Raises:
        UsageError: sizes that do not fit the buffer or the ranks.
        ConfigError: an unknown method.
    """
    starts = _starts(communicator, sizes, method)
    rank, world_size = communicator.rank, communicator.world_size
    if flat.shape != (starts[-1],) or not flat.is_contiguous():
        raise UsageError(
            "reduce_scatter_v needs one flat contiguous buffer",
            given=f"shape {tuple(flat.shape)}",
            allowed=f"[{starts[-1]}]",
        )
    own = flat[starts[rank] : starts[rank + 1]]
    if method == "fused":
        return PendingTensor([communicator.all_reduce(flat, tag=tag, async_op=True)], own)
    if method == "per_owner":
        works = [
            communicator.reduce(
                flat[starts[owner] : starts[owner + 1]], owner, tag=tag, async_op=True
            )
            for owner in range(world_size)
        ]
        return PendingTensor(works, own)
    chunk = max(sizes)
    padded = flat.new_zeros((world_size, chunk))
    for owner, size in enumerate(sizes):
        padded[owner, :size] = flat[starts[owner] : starts[owner + 1]]
    result = flat.new_empty(chunk)
    work = communicator.reduce_scatter(result, padded.view(-1), tag=tag, async_op=True)
    return PendingTensor([work], result[: sizes[rank]])


def all_gather_v(
    communicator: Communicator,
    part: Tensor,
    sizes: Sequence[int],
    *,
    method: VMethod = "per_owner",
    tag: str,
) -> PendingTensor:
    """Start to collect every rank's part [sizes[r]] into one buffer [sum(sizes)] on all ranks.

    The fused way adds zeros, so it alone turns -0.0 into 0.0.

    Raises:
        UsageError: a part that is not of this rank's size.
        ConfigError: an unknown method.
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
        return _gather_padded(communicator, part, sizes, starts, tag)
    make = torch.zeros if method == "fused" else torch.empty
    flat = make(starts[-1], dtype=part.dtype, device=part.device)
    flat[starts[rank] : starts[rank + 1]] = part
    if method == "fused":
        return PendingTensor([communicator.all_reduce(flat, tag=tag, async_op=True)], flat)
    works = [
        communicator.broadcast(
            flat[starts[owner] : starts[owner + 1]], owner, tag=tag, async_op=True
        )
        for owner in range(world_size)
    ]
    return PendingTensor(works, flat)


def _gather_padded(
    communicator: Communicator,
    part: Tensor,
    sizes: Sequence[int],
    starts: Sequence[int],
    tag: str,
) -> PendingTensor:
    chunk = max(sizes)
    mine = part.new_zeros(chunk)
    mine[: part.numel()] = part
    gathered = part.new_empty((communicator.world_size, chunk))
    flat = part.new_empty(starts[-1])
    work = communicator.all_gather_into(gathered, mine, tag=tag, async_op=True)

    def finish() -> None:
        work.wait()
        for owner, size in enumerate(sizes):
            flat[starts[owner] : starts[owner + 1]] = gathered[owner, :size]

    return PendingTensor([Work(finish=finish)], flat)


def _starts(communicator: Communicator, sizes: Sequence[int], method: str) -> list[int]:
    if method not in get_args(VMethod):
        raise ConfigError(
            "unknown way to run a V-collective", given=method, allowed=", ".join(get_args(VMethod))
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
