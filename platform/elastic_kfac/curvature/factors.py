"""Second-moment sums of layer inputs and output gradients: the raw material of A and G.

Canonical layout, used in the whole room: a weight is a matrix `[g, a]` with g outputs and a inputs,
`a` counting the homogeneous coordinate when the layer has a bias (last row and column). A convolution
is `[out_channels, in_channels * kernel (+ 1)]` in the order of `weight.reshape(out_channels, -1)`.
Grouped convolutions carry a leading `groups` dimension. Sums are not normalised: `A_sum` is
`Σ_n Σ_t ā āᵀ` and `G_sum` is `Σ_n Σ_t g gᵀ` over samples n and positions t of one call (Martens and
Grosse 2015; Grosse and Martens 2016 for convolutions).

Every function computes in at least float32, whatever the precision of its arguments.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elastic_kfac.curvature.sides import WHOLE, Side


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of `dtype` tensors are kept: never below float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def can_be_read(tensor: Tensor) -> bool:
    """Whether the host can look at a tensor's values without waiting for a device."""
    return tensor.device.type == "cpu"


def on_device(
    values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Numbers as a tensor, sent without having the host wait."""
    tensor = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in the memory of the host; a device needs none of its own for it."""
    if can_be_read(tensor):
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)


def gram(rows: Tensor) -> Tensor:
    """`Σ r rᵀ` over the rows of `rows [m, d]`: `[d, d]`."""
    return rows.t() @ rows


def linear_input_sum(inputs: Tensor, *, bias: bool, side: Side = WHOLE) -> Tensor:
    """`A_sum` of a Linear layer.

    Args:
        inputs: `[n, ..., d_in]`; the dimensions between are positions that share the weight.
        bias: Append the homogeneous coordinate.
        side: What is kept of the sum.
    """
    x = inputs.to(statistics_dtype(inputs.dtype))
    x = x.reshape(-1, x.shape[-1])
    return side.bordered_gram(x.t()) if bias else side.gram(x.t())


def linear_input_sums(inputs: Sequence[Tensor], *, bias: bool, side: Side = WHOLE) -> list[Tensor]:
    """`linear_input_sum` of calls of one shape, with the same bits."""
    rows = [x.to(statistics_dtype(x.dtype)).reshape(-1, x.shape[-1]) for x in inputs]
    cores = [side.gram(x.t()) for x in rows]
    if not bias:
        return cores
    sums = torch.stack(rows).sum(1)
    return list(side.bordered(torch.stack(cores), sums, rows[0].shape[0]).unbind())


def linear_output_sum(gradients: Tensor, *, side: Side = WHOLE) -> Tensor:
    """`G_sum` of a Linear layer from gradients with respect to its output `[n, ..., d_out]`."""
    g = gradients.to(statistics_dtype(gradients.dtype))
    return side.gram(g.reshape(-1, g.shape[-1]).t())


def embedding_input_sum(indices: Tensor, num_embeddings: int, padding_idx: int | None) -> Tensor:
    """Diagonal of `A_sum` of an Embedding: how often each token occurs, `[num_embeddings]`."""
    ones = torch.ones(indices.numel(), device=indices.device)
    counts = ones.new_zeros(num_embeddings).index_add_(0, indices.reshape(-1), ones)
    if padding_idx is not None:
        counts[padding_idx] = 0
    return counts


def norm_gradients(normalized: Tensor, gradients: Tensor, *, bias: bool, mode: str) -> Tensor:
    """Per-sample gradients of a normalisation layer's scale γ and shift β.

    They are `dγ = Σ_t g·x̂` and `dβ = Σ_t g` (Osawa et al. 2019).

    Args:
        normalized: x̂ `[n, positions, features]`.
        gradients: `[n, positions, features]`.
        mode: `unit` gives `[n, features, p]` (p = 2 with a shift, else 1), others `[n, p·features]` in
            the order (all γ, all β).
    """
    dtype = statistics_dtype(gradients.dtype)
    g = gradients.to(dtype)
    parts = [(g * normalized.to(dtype)).sum(1)]
    if bias:
        parts.append(g.sum(1))
    return torch.stack(parts, -1) if mode == "unit" else torch.cat(parts, -1)


def norm_moments(rows: Tensor, *, mode: str) -> Tensor:
    """Fisher sums over samples of what `norm_gradients` gives: `unit` `[features, p, p]`, `full`
    `[p·features, p·features]`, `diag` `[p·features]`."""
    if mode == "unit":
        return torch.einsum("nfp,nfq->fpq", rows, rows)
    return gram(rows) if mode == "full" else rows.square().sum(0)


def finite_sums(sums: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Whether the sums of each layer are finite `[layers]`."""
    if not sums:
        return torch.ones(0, dtype=torch.bool)
    # Diagonals are sums of squares: they are finite if and only if every summand was, and by
    # Cauchy-Schwarz no other entry can overflow first. One sum for all of a shape.
    groups: dict[Hashable, list[tuple[int, Tensor]]] = {}
    for index, part in enumerate(sums):
        for t in part.values():
            diagonal = t.diagonal(dim1=-2, dim2=-1) if t.dim() > 1 else t
            groups.setdefault((diagonal.shape, t.dtype), []).append((index, diagonal))
    traces = [
        torch.stack([diagonal for _, diagonal in group]).flatten(1).sum(1)
        for group in groups.values()
    ]
    owners = [index for group in groups.values() for index, _ in group]
    bad = ~torch.isfinite(torch.cat(traces))
    places = on_device(owners, bad.device, torch.int64)
    count = torch.zeros(len(sums), dtype=torch.int64, device=bad.device)
    return count.index_add_(0, places, bad.to(count.dtype)) == 0
