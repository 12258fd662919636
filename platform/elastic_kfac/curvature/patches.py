"""Second-moment sums of convolutions of one to three dimensions, transposed ones too.

Layouts are those of factors.py: a weight is `[out, in·k]` or `[groups, out/groups, in/groups·k]`, k
counting kernel offsets. Patches are strided views of the padded input, copied in pieces; no stride,
dilation or padding needs a case of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from elastic_kfac.curvature.autocorrelation import WEIGHT_GRADIENTS, autocorrelation_gram
from elastic_kfac.curvature.factors import statistics_dtype
from elastic_kfac.curvature.sides import WHOLE, Blocks, Side, Whole

# Patches are copied in pieces of at most this many elements (64 MiB of float32).
_PATCH_ELEMENTS = 1 << 24


def conv_output_sum(gradients: Tensor, groups: int, side: Side = WHOLE) -> Tensor:
    """`G_sum` of a convolution from `[n, out, ...]`: `[out, out]` or `[groups, out/groups, ...]`."""
    return _channel_gram(gradients.to(statistics_dtype(gradients.dtype)), groups, side)


def conv_lengths(inputs: Tensor, module: _ConvNd) -> tuple[int, ...]:
    """Output positions of a convolution along each dimension."""
    if isinstance(module, _ConvTransposeNd):
        return _transposed_lengths(inputs, module)
    sides = _padding_sides(module)
    return tuple(
        (length + sum(around) - d * (k - 1) - 1) // s + 1
        for length, around, k, s, d in zip(
            inputs.shape[2:], sides, module.kernel_size, module.stride, module.dilation, strict=True
        )
    )


def conv_input_sum(
    inputs: Tensor,
    module: _ConvNd,
    *,
    bias: bool,
    side: Side = WHOLE,
    real: Tensor | None = None,
) -> Tensor:
    """`A_sum` of a convolution: `[a, a]`, or `[groups, a, a]`.

    Exact for every stride, padding (numbers, 'same', 'valid', non-zero modes), dilation and group
    count. Where the stride is one and the padding wide enough, A is assembled from the spatial
    autocorrelation of the input minus border strips (autocorrelation.py), without ever forming patches.

    Args:
        inputs: `[n, in_channels, ...]`.
        module: The convolution.
        bias: Append the homogeneous coordinate.
        side: What is kept of the sum.
        real: Output positions `[n, ...]` that count; None for all.
    """
    x = inputs.to(statistics_dtype(inputs.dtype))
    x, padding = _resolve_padding(x, module)
    x, groups = _split(x, module, side)
    window = Window(module.kernel_size, module.stride, module.dilation)
    if real is not None:
        core, sums = _masked_gram(_zero_padded(x, padding), window, groups, real)
        core, sums = _joined(core, module, side), sums.view(module.groups, -1)
        sums = sums if module.groups > 1 else sums[0]
        return side.bordered(core, sums, int(real.sum())) if bias else core
    if max(*window.kernel, *(p + 1 for p in padding)) == 1:
        read: tuple[Any, ...] = (..., *(slice(None, None, step) for step in window.stride))
        core = _channel_gram(x[read], groups)
    elif _correlates(x, window, padding, groups):
        core = autocorrelation_gram(x, window.kernel, padding)
    else:
        core = _patch_gram(_zero_padded(x, padding), window, groups)
    core = _joined(core, module, side)
    if not bias:
        return core
    total = _zero_padded(x.sum(0, keepdim=True), padding)
    sums = _patch_rows(_windows(total, window), module.groups).sum(-1)
    return side.bordered(core, sums, x.shape[0] * math.prod(conv_lengths(inputs, module)))


def conv_mean_patches(inputs: Tensor, module: _ConvNd, real: Tensor | None = None) -> Tensor:
    """The mean patch of each sample over its output positions, `[groups, a, n]`; over the `real` ones
    `[n, ...]`, without samples that have none."""
    x, padding = _resolve_padding(inputs.to(statistics_dtype(inputs.dtype)), module)
    windows = _windows(
        _zero_padded(x, padding), Window(module.kernel_size, module.stride, module.dilation)
    )
    positions = tuple(range(2, 2 + len(module.kernel_size)))
    if real is None:
        means = windows.mean(positions)
    else:
        some = real.flatten(1).any(1)
        weights = real[some].to(x.dtype)
        weights = weights / weights.flatten(1).sum(1).view(-1, *[1] * len(positions))
        weights = weights.view(weights.shape[0], 1, *weights.shape[1:], *[1] * len(positions))
        means = (windows[some] * weights).sum(positions)
    return means.reshape(means.shape[0], module.groups, -1).permute(1, 2, 0)


def transposed_mean_patches(inputs: Tensor, module: _ConvTransposeNd) -> Tensor:
    """As `conv_mean_patches`, of a transposed convolution (see `transposed_input_sum`)."""
    spatial = tuple(range(2, inputs.dim()))
    x = inputs.to(statistics_dtype(inputs.dtype)).flip(spatial)
    lengths = _transposed_lengths(inputs, module)
    sums = x.new_zeros(*x.shape[:2], *module.kernel_size)
    for phase in product(
        *(_phases(module, i, inputs.shape[i + 2], u) for i, u in enumerate(lengths))
    ):
        window = Window(
            [axis.taps for axis in phase], [1] * len(phase), [axis.dilation for axis in phase]
        )
        windows = _windows(F.pad(x, _flat([axis.sides for axis in phase])), window)
        sums[(slice(None), slice(None), *(axis.offsets for axis in phase))] = windows.sum(spatial)
    means = sums / math.prod(lengths)
    return means.reshape(means.shape[0], module.groups, -1).permute(1, 2, 0)


def conv_weight_gradient(inputs: Tensor, gradients: Tensor, module: _ConvNd) -> Tensor:
    """The gradient of a convolution's weight for `inputs [n, in, ...]` and `gradients [n, out, ...]`."""
    x, padding = _resolve_padding(inputs.to(gradients.dtype), module)
    return WEIGHT_GRADIENTS[len(padding)](
        x,
        list(module.weight.shape),
        gradients,
        stride=module.stride,
        padding=padding,
        dilation=module.dilation,
        groups=module.groups,
    )


def transposed_input_sum(
    inputs: Tensor, module: _ConvTransposeNd, *, bias: bool, side: Side = WHOLE
) -> Tensor:
    """`A_sum` of a transposed convolution: `[a, a]`, or `[groups, a, a]`.

    Output pixel u reads input pixel t through kernel offset k where `stride·t + dilation·k = u +
    padding`, so u reads only the offsets of one residue (phase) modulo the stride: A has a block per
    phase and zeros between them. A block is the patch Gram matrix of the input under a smaller,
    flipped kernel; the zeros that the stride puts between pixels are never formed.

    Args:
        inputs: `[n, in_channels, ...]`.
        module: The transposed convolution; the padding of its output is the one that it was built with.
        bias: Append the homogeneous coordinate.
        side: What is kept of the sum.
    """
    spatial = tuple(range(2, inputs.dim()))
    x = inputs.to(statistics_dtype(inputs.dtype)).flip(spatial)
    x, groups = _split(x, module, side)
    total, lengths = x.sum(0, keepdim=True), _transposed_lengths(inputs, module)
    shape = (groups, x.shape[1] // groups, *module.kernel_size)
    core, sums = x.new_zeros(*shape, *shape[1:]), x.new_zeros(shape)
    phases = product(*(_phases(module, i, inputs.shape[i + 2], u) for i, u in enumerate(lengths)))
    for phase in phases:
        sides = _flat([axis.sides for axis in phase])
        window = Window(
            [axis.taps for axis in phase], [1] * len(phase), [axis.dilation for axis in phase]
        )
        at = (slice(None), *(axis.offsets for axis in phase))
        block = core[(slice(None), *at, *at)]
        block.copy_(_patch_gram(F.pad(x, sides), window, groups).view(block.shape))
        part = sums[(slice(None), *at)]
        patches = _patch_rows(_windows(F.pad(total, sides), window), groups)
        part.copy_(patches.sum(-1).view(part.shape))
    a = math.prod(shape[1:])
    core, sums = core.view(groups, a, a), sums.view(module.groups, -1)
    if groups == 1:
        core = core[0]
    if module.groups == 1:
        sums = sums[0]
    core = _joined(core, module, side)
    return side.bordered(core, sums, x.shape[0] * math.prod(lengths)) if bias else core


def transposed_weight_gradient(
    inputs: Tensor, gradients: Tensor, module: _ConvTransposeNd
) -> Tensor:
    """The gradient of a transposed convolution's weight: that of a convolution of the output gradient.

    Raises:
        RuntimeError: If the module was called with an `output_size` that is not its own.
    """
    if gradients.shape[2:] != _transposed_lengths(inputs, module):
        raise RuntimeError("called with output_size")
    further = zip(_padding_sides(module), module.output_padding, strict=True)
    sides = [(before, after - more) for (before, after), more in further]
    return WEIGHT_GRADIENTS[len(module.kernel_size)](
        F.pad(gradients, _flat(sides)),
        list(module.weight.shape),
        inputs.to(gradients.dtype),
        stride=module.stride,
        dilation=module.dilation,
        groups=module.groups,
    )


def _split(x: Tensor, module: _ConvNd, side: Side) -> tuple[Tensor, int]:
    """`x [n, channels, ...]` and how many groups of channels have a Gram matrix of their own, so that all
    of it is kept; a channel and all its kernel offsets are together."""
    if isinstance(side, Whole):
        return x, module.groups
    size = side.size // math.prod(module.kernel_size) if isinstance(side, Blocks) else 1
    x = x.unflatten(1, (module.groups, -1))
    count = -(-x.shape[2] // size)
    x = F.pad(x, [0, 0] * (x.dim() - 3) + [0, count * size - x.shape[2]])
    return x.flatten(1, 2), module.groups * count


def _joined(core: Tensor, module: _ConvNd, side: Side) -> Tensor:
    """The Gram matrices of the groups of `_split` in the layout of a side."""
    if isinstance(side, Whole):
        return core
    if isinstance(side, Blocks):
        blocks = core.view(-1, side.size, side.size)
        return blocks if module.groups == 1 else blocks.unflatten(0, (module.groups, -1))
    return core.diagonal(dim1=-2, dim2=-1).flatten()


class Window(NamedTuple):
    """What an output position reads along each spatial dimension."""

    kernel: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]


class Phase(NamedTuple):
    """Along one dimension, the output positions of a transposed convolution that read the same kernel
    offsets."""

    offsets: slice
    taps: int
    """Number of these offsets."""
    dilation: int
    """Input pixels between one offset and the next."""
    sides: tuple[int, int]
    """Padding (cropping, if negative) of the flipped input, so that its windows are those positions."""


def _phases(module: _ConvTransposeNd, axis: int, length: int, out: int) -> Iterator[Phase]:
    kernel, stride = module.kernel_size[axis], module.stride[axis]
    dilation, (padding, _) = module.dilation[axis], _padding_sides(module)[axis]
    common = math.gcd(dilation, stride)
    for residue in range(stride):
        offsets = slice(
            next((k for k in range(kernel) if dilation * k % stride == residue), kernel),
            kernel,
            stride // common,
        )
        taps = len(range(kernel)[offsets])
        # Positions stride·w + residue - padding for w in [first, end).
        first, end = (-((residue - edge) // stride) for edge in (padding, padding + out))
        if not taps or first >= end:
            continue
        step = dilation // common
        shift = (dilation * offsets.start - residue) // stride
        sides = (end - length - shift, shift - first + step * (taps - 1))
        yield Phase(offsets, taps, step, sides)


def _transposed_lengths(inputs: Tensor, module: _ConvTransposeNd) -> tuple[int, ...]:
    return tuple(
        (length - 1) * s - sum(around) + d * (k - 1) + further + 1
        for length, k, s, around, d, further in zip(
            inputs.shape[2:],
            module.kernel_size,
            module.stride,
            _padding_sides(module),
            module.dilation,
            module.output_padding,
            strict=True,
        )
    )


def _padding_sides(module: _ConvNd) -> list[tuple[int, int]]:
    """Padding before and after, for every spatial dimension."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if isinstance(module.padding, str):  # 'same'
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in module.padding]


def _resolve_padding(x: Tensor, module: _ConvNd) -> tuple[Tensor, tuple[int, ...]]:
    """Symmetric zero padding stays a number; everything else is written into the tensor."""
    sides = _padding_sides(module)
    if module.padding_mode == "zeros" and all(before == after for before, after in sides):
        return x, tuple(before for before, _ in sides)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, _flat(sides), mode=mode), (0,) * len(sides)


def _zero_padded(x: Tensor, padding: Sequence[int]) -> Tensor:
    return F.pad(x, _flat([(p, p) for p in padding])) if any(padding) else x


def _flat(sides: Sequence[tuple[int, int]]) -> list[int]:
    """As `F.pad` takes them: the last dimension first."""
    return [side for around in reversed(sides) for side in around]


def _windows(x: Tensor, window: Window) -> Tensor:
    """View `[n, channels, *positions, *kernel]` of `x [n, channels, ...]`."""
    for axis, (k, s, d) in enumerate(zip(*window, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    return x


def _patch_rows(windows: Tensor, groups: int) -> Tensor:
    """`[a, n·t]`, or `[groups, a, n·t]`, of a view by `_windows`."""
    axes = range(2, windows.dim())
    positions, kernel = axes[: len(axes) // 2], axes[len(axes) // 2 :]
    rows = windows.permute(1, *kernel, 0, *positions)
    side = windows.shape[1] // groups * math.prod(windows.shape[i] for i in kernel)
    return rows.reshape(side, -1) if groups == 1 else rows.reshape(groups, side, -1)


def _channel_gram(x: Tensor, groups: int, side: Side = WHOLE) -> Tensor:
    """What a side keeps of the Gram matrix of the channels of `x [n, channels, ...]` over samples and
    positions, per group."""
    columns = x.flatten(2)
    is_plain = groups == 1 and isinstance(side, Whole) and x.device.type == "cpu"
    if is_plain and columns.shape[2] >= columns.shape[1]:
        # One product after the other: they are large enough, and need no copy.
        return torch.addbmm(x.new_zeros(x.shape[1], x.shape[1]), columns, columns.mT)
    rows = columns.transpose(0, 1).reshape(x.shape[1], -1)
    return side.gram(rows if groups == 1 else rows.unflatten(0, (groups, -1)))


def _patch_gram(x: Tensor, window: Window, groups: int) -> Tensor:
    """Gram matrix of the patches of `x [n, channels, ...]` over samples and positions, per group."""
    windows = _windows(x, window)
    lines = windows.shape[2]
    line = math.prod(windows.shape[i] for i in range(1, windows.dim()) if i != 2)
    total: Tensor | None = None
    for samples in windows.split(max(1, _PATCH_ELEMENTS // (lines * line))):
        # One volume may be too large by itself.
        for piece in samples.split(min(lines, max(1, _PATCH_ELEMENTS // line)), 2):
            rows = _patch_rows(piece, groups)
            part = rows @ rows.mT
            total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _masked_gram(x: Tensor, window: Window, groups: int, real: Tensor) -> tuple[Tensor, Tensor]:
    """`_patch_gram` over the `real [n, ...]` positions, and the sums of their patches."""
    windows = _windows(x, window)
    samples = max(1, _PATCH_ELEMENTS // max(1, windows[:1].numel()))
    core: Tensor | float = 0.0
    sums: Tensor | float = 0.0
    for piece, mask in zip(windows.split(samples), real.split(samples), strict=True):
        rows = _patch_rows(piece, groups)[..., mask.reshape(-1)]
        core, sums = core + rows @ rows.mT, sums + rows.sum(-1)
    assert isinstance(core, Tensor) and isinstance(sums, Tensor)
    return core, sums


def _correlates(x: Tensor, window: Window, padding: Sequence[int], groups: int) -> bool:
    """Whether `autocorrelation_gram` can and should be used."""
    wide = all(2 * p >= k - 1 for p, k in zip(padding, window.kernel, strict=True))
    # The strips need their own pixels: tiny images go the plain way.
    roomy = all(length >= 2 * k for length, k in zip(x.shape[2:], window.kernel, strict=True))
    steps = {*window.stride, *window.dilation, groups}
    return steps == {1} and wide and roomy
