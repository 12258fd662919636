"""ReduceScatterV in half precision, with one scale per part so that no sum overflows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.v_collectives import VMethod, reduce_scatter_v


def reduce_scatter_half(
    communicator: Communicator,
    parts: Sequence[Tensor],
    sizes: Sequence[int],
    half: torch.dtype,
    *,
    method: VMethod,
    tag: str,
) -> Tensor:
    """Sums flat `parts` over the ranks; each rank gets its own ones, joined, in their own precision.

    Args:
        communicator: The ranks.
        parts: Flat tensors in owner order, the same lengths on all ranks.
        sizes: Elements that each rank owns; a sum of whole parts.
        half: `torch.float16` or `torch.bfloat16`.
        method: How the V-collective runs.
        tag: Under which the traffic is counted.
    """
    flat = torch.cat(list(parts)) if parts else torch.zeros(0)
    # The sum of the ranks' largest magnitudes bounds the magnitude of any sum.
    peaks = torch.stack([p.abs().max() if p.numel() else p.new_zeros(()) for p in parts])
    communicator.all_reduce(peaks, tag=f"{tag}/scales").wait()
    room = torch.finfo(half).max / 4
    scales = torch.exp2(torch.floor(torch.log2(room / peaks.clamp(min=1e-30))).clamp(max=126))
    lengths = torch.tensor([p.numel() for p in parts], device=flat.device)
    scaled = (flat * torch.repeat_interleave(scales, lengths)).to(half)
    result = reduce_scatter_v(communicator, scaled, sizes, method=method, tag=tag).wait()
    first = sum(sizes[: communicator.rank])
    ends = torch.cumsum(lengths, 0)
    mine = (ends > first) & (ends <= first + sizes[communicator.rank])
    return result.to(flat.dtype) / torch.repeat_interleave(scales[mine], lengths[mine])
