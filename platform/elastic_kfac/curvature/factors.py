"""Second-moment sums of layer inputs and output gradients: the raw material of A and G.

Canonical layout, used in the whole room: a weight is a matrix `[g, a]` with g outputs and a inputs,
`a` counting the homogeneous coordinate when the layer has a bias (last row and column). A convolution
is `[out_channels, in_channels * kh * kw (+ 1)]` in the order of `weight.reshape(out_channels, -1)`.
Grouped convolutions carry a leading `groups` dimension. Sums are not normalised: `A_sum` is
`Σ_n Σ_t ā āᵀ` and `G_sum` is `Σ_n Σ_t g gᵀ` over samples n and positions t of one call (Martens and
Grosse 2015; Grosse and Martens 2016 for convolutions).

Every function computes in at least float32, whatever the precision of its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

# Unfolded patches are formed in pieces of at most this many elements (64 MiB of float32).
_UNFOLD_ELEMENTS = 1 << 24


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of `dtype` tensors are kept: never below float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def gram(rows: Tensor) -> Tensor:
    """`Σ r rᵀ` over the rows of `rows [m, d]`: `[d, d]`."""
    return rows.t() @ rows


def _append_homogeneous(core: Tensor, sums: Tensor, count: float) -> Tensor:
    """Borders `core [.., d, d]` with `sums [.., d]` and the count: the coordinate of the bias."""
    d = core.shape[-1]
    full = core.new_empty(*core.shape[:-2], d + 1, d + 1)
    full[..., :d, :d] = core
    full[..., :d, d] = sums
    full[..., d, :d] = sums
    full[..., d, d] = count
    return full


def linear_input_sum(inputs: Tensor, *, bias: bool, reduce: bool) -> Tensor:
    """`A_sum` of a Linear layer.

    Args:
        inputs: `[n, ..., d_in]`; the dimensions between are positions that share the weight.
        bias: Append the homogeneous coordinate.
        reduce: Average the inputs over positions first (KFAC-reduce, Eschenhagen et al. 2023).
    """
    x = inputs.to(statistics_dtype(inputs.dtype))
    if reduce and x.dim() > 2:
        x = x.flatten(1, -2).mean(1)
    x = x.reshape(-1, x.shape[-1])
    core = gram(x)
    return _append_homogeneous(core, x.sum(0), x.shape[0]) if bias else core


def linear_output_sum(gradients: Tensor, *, reduce: bool) -> Tensor:
    """`G_sum` of a Linear layer from gradients with respect to its output `[n, ..., d_out]`."""
    g = gradients.to(statistics_dtype(gradients.dtype))
    if reduce and g.dim() > 2:
        g = g.flatten(1, -2).sum(1)
    return gram(g.reshape(-1, g.shape[-1]))


def embedding_input_sum(indices: Tensor, num_embeddings: int, padding_idx: int | None) -> Tensor:
    """Diagonal of `A_sum` of an Embedding: how often each token occurs, `[num_embeddings]`."""
    counts = torch.bincount(indices.reshape(-1), minlength=num_embeddings)
    counts = counts.to(torch.get_default_dtype())
    if padding_idx is not None:
        counts[padding_idx] = 0
    return counts


def conv_output_sum(gradients: Tensor, groups: int) -> Tensor:
    """`G_sum` of a convolution from `[n, out, h, w]`: `[out, out]` or `[groups, out/groups, ...]`."""
    g = gradients.to(statistics_dtype(gradients.dtype))
    n, out = g.shape[:2]
    if groups == 1:
        # [out, n*t]: one copy and one large product beats n small ones.
        rows = g.flatten(2).transpose(0, 1).reshape(out, -1)
        return rows @ rows.t()
    rows = (
        g.reshape(n, groups, out // groups, -1)
        .permute(1, 2, 0, 3)
        .reshape(groups, out // groups, -1)
    )
    return rows @ rows.transpose(1, 2)


def conv_positions(inputs: Tensor, module: nn.Conv2d) -> int:
    """T, the number of output positions of a convolution."""
    kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
    stride = _pair(module.stride)
    sides = _padding_sides(module, kernel, dilation)
    lengths = (inputs.shape[-2] + sides[2] + sides[3], inputs.shape[-1] + sides[0] + sides[1])
    return math.prod(
        _output_length(length, 0, d, k, s)
        for length, d, k, s in zip(lengths, dilation, kernel, stride, strict=True)
    )


def conv_input_sum(inputs: Tensor, module: nn.Conv2d, *, bias: bool) -> Tensor:
    """`A_sum` of a convolution: `[a, a]`, or `[groups, a, a]`.

    Exact for every stride, padding (numbers, 'same', 'valid', non-zero modes), dilation and group
    count. Where the stride is one and the padding wide enough, A is assembled from the spatial
    autocorrelation of the input (one weight-gradient convolution) minus border strips, without ever
    forming patches; otherwise patches are unfolded in pieces.

    Args:
        inputs: `[n, in_channels, h, w]`.
        module: The convolution.
        bias: Append the homogeneous coordinate.
    """
    x = inputs.to(statistics_dtype(inputs.dtype))
    kernel = _pair(module.kernel_size)
    stride = _pair(module.stride)
    dilation = _pair(module.dilation)
    x, padding = _resolve_padding(x, module, kernel, dilation)
    n, channels, height, width = x.shape
    groups = module.groups
    wide = all(2 * p >= k - 1 for p, k in zip(padding, kernel, strict=True))
    # The strips need their own rows and columns: tiny images go the plain way.
    roomy = height >= 2 * kernel[0] and width >= 2 * kernel[1]
    if kernel == (1, 1) and padding == (0, 0):
        rows = x[:, :, :: stride[0], :: stride[1]].flatten(2)
        core = _group_gram(rows, groups)
    elif stride == (1, 1) and dilation == (1, 1) and groups == 1 and wide and roomy:
        core = _autocorrelation_gram(x, kernel, padding)
    else:
        core = _unfolded_gram(x, kernel, stride, padding, dilation, groups)
    if not bias:
        return core
    patch_sums = F.unfold(x.sum(0, keepdim=True), kernel, dilation, padding, stride)[0].sum(1)
    sums = patch_sums.reshape(groups, -1) if groups > 1 else patch_sums
    return _append_homogeneous(core, sums, n * conv_positions(inputs, module))


def conv_weight_gradient(inputs: Tensor, gradients: Tensor, module: nn.Conv2d) -> Tensor:
    """The gradient of a convolution's weight for `inputs [n, in, h, w]` and `gradients [n, out, ...]`."""
    kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
    x, padding = _resolve_padding(inputs.to(gradients.dtype), module, kernel, dilation)
    return conv2d_weight(
        x,
        list(module.weight.shape),
        gradients,
        stride=_pair(module.stride),
        padding=padding,
        dilation=dilation,
        groups=module.groups,
    )


def norm_gradient_sum(normalized: Tensor, gradients: Tensor, *, bias: bool, mode: str) -> Tensor:
    """Fisher sums of a normalisation layer's scale γ and shift β over samples.

    Per-sample gradients are `dγ = Σ_t g·x̂` and `dβ = Σ_t g` (Osawa et al. 2019).

    Args:
        normalized: x̂ `[n, positions, features]`.
        gradients: `[n, positions, features]`.
        mode: `unit` gives `[features, p, p]` (p = 2 with a shift, else 1), `full`
            `[p·features, p·features]` in the order (all γ, all β), `diag` `[p·features]`.
    """
    dtype = statistics_dtype(gradients.dtype)
    g = gradients.to(dtype)
    parts = [(g * normalized.to(dtype)).sum(1)]
    if bias:
        parts.append(g.sum(1))
    if mode == "unit":
        stacked = torch.stack(parts, -1)  # [n, features, p]
        return torch.einsum("nfp,nfq->fpq", stacked, stacked)
    rows = torch.cat(parts, -1)
    return gram(rows) if mode == "full" else rows.square().sum(0)


def finite_sums(sums: Sequence[Mapping[str, Tensor]]) -> list[bool]:
    """Per layer, whether its sums are finite; one transfer to the host for all."""
    if not sums:
        return []
    # Diagonals are sums of squares: they are finite if and only if every summand was, and by
    # Cauchy-Schwarz no other entry can overflow first. One transfer for all layers.
    traces = []
    for part in sums:
        diagonals = [t.diagonal(dim1=-2, dim2=-1) if t.dim() > 1 else t for t in part.values()]
        traces.append(torch.stack([d.sum().double() for d in diagonals]).sum())
    return torch.isfinite(torch.stack(traces)).tolist()


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _output_length(length: int, padding: int, dilation: int, kernel: int, stride: int) -> int:
    return (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _padding_sides(
    module: nn.Conv2d, kernel: tuple[int, int], dilation: tuple[int, int]
) -> list[int]:
    """Padding as left, right, top, bottom (the order of `F.pad`)."""
    if module.padding == "valid":
        return [0, 0, 0, 0]
    if isinstance(module.padding, str):  # 'same'
        rows, columns = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
    rows, columns = _pair(module.padding)
    return [columns, columns, rows, rows]


def _resolve_padding(
    x: Tensor, module: nn.Conv2d, kernel: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Symmetric zero padding stays a number; everything else is written into the tensor."""
    sides = _padding_sides(module, kernel, dilation)
    symmetric = sides[0] == sides[1] and sides[2] == sides[3]
    if module.padding_mode == "zeros" and symmetric:
        return x, (sides[2], sides[0])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, sides, mode=mode), (0, 0)


def _group_gram(rows: Tensor, groups: int) -> Tensor:
    """Gram of `rows [n, groups·d, t]` over n and t, per group."""
    n, channels, _ = rows.shape
    if groups == 1:
        flat = rows.transpose(0, 1).reshape(channels, -1)
        return flat @ flat.t()
    flat = rows.reshape(n, groups, channels // groups, -1).permute(1, 2, 0, 3)
    flat = flat.reshape(groups, channels // groups, -1)
    return flat @ flat.transpose(1, 2)


def _unfolded_gram(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    n, channels, height, width = x.shape
    out = math.prod(
        _output_length(length, p, d, k, s)
        for length, p, d, k, s in zip(
            (height, width), padding, dilation, kernel, stride, strict=True
        )
    )
    patch = channels * kernel[0] * kernel[1]
    chunk = max(1, _UNFOLD_ELEMENTS // max(1, patch * out))
    total: Tensor | None = None
    for piece in x.split(chunk):
        patches = F.unfold(piece, kernel, dilation, padding, stride)
        part = _group_gram(patches, groups)
        total = part if total is None else total.add_(part)
    if total is None:
        size = patch // groups
        shape = (size, size) if groups == 1 else (groups, size, size)
        return x.new_zeros(shape)
    return total


def _autocorrelation_gram(x: Tensor, kernel: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Patch Gram matrix of a stride-1 convolution from the autocorrelation of its input.

    Block (i, j) of A, for kernel offsets i and j, is `Σ_u x[u] x[u + j − i]ᵀ` over the pixels u that
    offset i visits. The sum over all pixels depends on `j − i` only; what offset i does not visit are
    strips of rows and columns at the border, subtracted (and their corners added back). Blocks with
    j's row above i's follow by symmetry.
    """
    kh, kw = kernel
    _, channels, height, width = x.shape
    rows_off = [_unvisited(i, kh, padding[0], height) for i in range(kh)]
    cols_off = [_unvisited(i, kw, padding[1], width) for i in range(kw)]
    full = _lagged(x, x, kh, kw)  # [kh, 2kw-1, C, C]
    lag = torch.arange(kw, device=x.device)
    column_lag = (lag[None, :] - lag[:, None] + kw - 1).reshape(-1)  # index of j_c - i_c
    blocks = x.new_empty(kh, kh, kw, kw, channels, channels)
    for ir in range(kh):
        for jr in range(ir, kh):
            dr = jr - ir
            block = blocks[ir, jr]
            torch.index_select(full[dr], 0, column_lag, out=block.view(kw * kw, channels, channels))
            for start, stop in rows_off[ir]:
                stop_valid = min(stop, height - dr)
                if start < stop_valid:
                    strip = _lagged(
                        x[:, :, start:stop_valid], x[:, :, start + dr : stop_valid + dr], 1, kw
                    )[0]
                    block -= strip[column_lag].view(kw, kw, channels, channels)
    for ic in range(kw):
        for jc in range(kw):
            dc = jc - ic
            for start, stop in cols_off[ic]:
                a, b = max(start, -dc), min(stop, width - dc)
                if a >= b:
                    continue
                here, there = x[:, :, :, a:b], x[:, :, :, a + dc : b + dc]
                strip = _lagged(here, there, kh, 1)[:, 0]
                for ir in range(kh):
                    for jr in range(ir, kh):
                        block = blocks[ir, jr, ic, jc]
                        block -= strip[jr - ir]
                        for top, bottom in rows_off[ir]:
                            end = min(bottom, height - (jr - ir))
                            if top < end:
                                block += _cross(
                                    here[:, :, top:end], there[:, :, top + jr - ir : end + jr - ir]
                                )
    for ir in range(kh):
        for jr in range(ir):
            blocks[ir, jr] = blocks[jr, ir].permute(1, 0, 3, 2)
    side = channels * kh * kw
    return blocks.permute(4, 0, 2, 5, 1, 3).reshape(side, side)


def _unvisited(offset: int, kernel: int, padding: int, length: int) -> list[tuple[int, int]]:
    """Ranges of pixel rows that kernel offset `offset` never reads."""
    top = max(0, offset - padding)
    bottom = max(0, kernel - 1 - offset - padding)
    return [r for r in ((0, top), (length - bottom, length)) if r[0] < r[1]]


def _lagged(here: Tensor, there: Tensor, kh: int, kw: int) -> Tensor:
    """`R[dr, dc + kw − 1] = Σ_n Σ_u here[u] there[u + (dr, dc)]ᵀ`, dr in [0, kh), |dc| < kw."""
    channels = here.shape[1]
    padded = F.pad(there, (kw - 1, kw - 1, 0, kh - 1))
    lags = conv2d_weight(padded, (channels, channels, kh, 2 * kw - 1), here)
    return lags.permute(2, 3, 0, 1).contiguous()


def _cross(here: Tensor, there: Tensor) -> Tensor:
    left = here.transpose(0, 1).reshape(here.shape[1], -1)
    return left @ there.transpose(0, 1).reshape(there.shape[1], -1).t()
