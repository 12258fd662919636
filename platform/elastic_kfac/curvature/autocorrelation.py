"""Patch Gram matrices of convolutions of stride one, from the autocorrelation of their input.

Block (i, j) of A, for kernel offsets i and j, is `Σ_u x[u] x[u + j − i]ᵀ` over the pixels u that offset i
visits. The sum over all pixels depends on `j − i` only; what offset i does not visit are strips at the
border along each dimension, subtracted (and, by inclusion and exclusion, their intersections added back
and subtracted in turn). So A is a fixed linear map of a few matrices `[channels, channels]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from elastic_kfac.curvature.factors import on_device

Array = NDArray[np.float64]

WEIGHT_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}

_PIECE = 1 << 20
"""Elements of what is worked on in pieces, so that it stays in the processor's caches."""


class _Strip(NamedTuple):
    """Pixels along one dimension, and the lag at which they meet others."""

    start: int
    stop: int
    lag: int


class _Choice(NamedTuple):
    """What one dimension contributes to a sum."""

    strip: _Strip | None
    """None: all pixels."""
    lags: range
    weights: Array
    """`[lags, i, j]`: this dimension's part in how much of the sum belongs to block (i, j)."""


class _Sum(NamedTuple):
    """`Σ_n Σ_u x[u] x[u + lag]ᵀ` over some pixels u, for some lags."""

    strips: tuple[_Strip | None, ...]
    lags: tuple[range, ...]
    """Along each dimension; that of a strip is its own."""
    kept: tuple[int, ...]
    """Which of all their combinations."""


def autocorrelation_gram(x: Tensor, kernel: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Gram matrix `[a, a]` of the patches of `x [n, channels, ...]`, under a kernel whose padding is at
    least half of it."""
    channels, offsets = x.shape[1], math.prod(kernel)
    needed, weights = _plan(tuple(kernel), tuple(padding), tuple(x.shape[2:]))
    sums = torch.cat([_sums(x, one) for one in needed])
    sums = torch.cat((sums, sums.mT))
    to_blocks = on_device(weights, x.device, x.dtype)
    total = x.new_empty(channels, offsets, channels, offsets)
    size = max(1, _PIECE // (channels * offsets**2))
    for start in range(0, channels, size):
        blocks = sums[:, start : start + size].flatten(1).t() @ to_blocks
        blocks = blocks.view(-1, channels, offsets, offsets)
        total[start : start + size] = blocks.transpose(1, 2)
    return total.view(channels * offsets, -1)


@lru_cache(maxsize=256)
def _plan(
    kernel: tuple[int, ...], padding: tuple[int, ...], lengths: tuple[int, ...]
) -> tuple[list[_Sum], Array]:
    """The sums needed, and the weights `[sums and their transposes, i·j]` of which A consists."""
    # Blocks with j before i come from the transposes, and half of those with j = i.
    i, j = np.indices([math.prod(kernel)] * 2)
    share = np.where(i == j, 0.5, i < j)
    needed, weights = [], []
    for choice in product(
        *(_choices(*axis) for axis in zip(kernel, padding, lengths, strict=True))
    ):
        joint = np.ones((1, 1, 1))
        for one in choice:
            lags, rows, columns = (
                a * b for a, b in zip(joint.shape, one.weights.shape, strict=True)
            )
            joint = np.einsum("lij,mpq->lmipjq", joint, one.weights).reshape(lags, rows, columns)
        joint = joint * share
        used = np.abs(joint).sum((1, 2)).reshape([len(one.lags) for one in choice]) > 0
        if used.any():
            # The lags in use are consecutive.
            within = tuple(slice(min(found), max(found) + 1) for found in np.nonzero(used))
            needed.append(
                _Sum(
                    tuple(one.strip for one in choice),
                    tuple(one.lags[part] for one, part in zip(choice, within, strict=True)),
                    tuple(np.flatnonzero(used[within]).tolist()),
                )
            )
            weights.append(joint[used.reshape(-1)])
    direct = np.concatenate(weights)
    both = np.concatenate((direct, direct.swapaxes(1, 2)))
    return needed, both.reshape(len(both), -1)


def _choices(kernel: int, padding: int, length: int) -> Iterator[_Choice]:
    i, j = np.indices((kernel, kernel))
    lags = range(1 - kernel, kernel)
    yield _Choice(None, lags, np.stack([j - i == lag for lag in lags]).astype(np.float64))
    strips: dict[_Strip, Array] = {}
    for first, second in product(range(kernel), repeat=2):
        for strip in _unvisited(first, second - first, kernel, padding, length):
            strips.setdefault(strip, np.zeros((1, kernel, kernel)))[0, first, second] = -1
    for strip, taken in strips.items():
        yield _Choice(strip, range(strip.lag, strip.lag + 1), taken)


def _unvisited(offset: int, lag: int, kernel: int, padding: int, length: int) -> Iterator[_Strip]:
    """Pixels that an offset does not visit and that have one at a lag."""
    top, bottom = max(0, offset - padding), max(0, kernel - 1 - offset - padding)
    for start, stop in ((0, top), (length - bottom, length)):
        start, stop = max(start, -lag), min(stop, length - lag)
        if start < stop:
            yield _Strip(start, stop, lag)


def _sums(x: Tensor, of: _Sum) -> Tensor:
    """`[kept, channels, channels]`."""
    if not any(of.strips) and _prefers_fourier(x, of.lags):
        return _by_fourier(x, of)
    padding: list[int] = []
    here = there = x
    for axis, (strip, lags) in enumerate(zip(of.strips, of.lags, strict=True), start=2):
        padding[:0] = (0, 0) if strip else (-lags[0], lags[-1])
        if strip is not None:
            size = strip.stop - strip.start
            here = here.narrow(axis, strip.start, size)
            there = there.narrow(axis, strip.start + strip.lag, size)
    # Gathered once: the pixels of a strip lie far apart.
    here = here.contiguous()
    there = F.pad(there if any(s and s.lag for s in of.strips) else here, padding)
    sums = _by_patches(here, there) if any(of.strips) else _by_convolution(here, there)
    return sums if len(of.kept) == len(sums) else sums[list(of.kept)]


def _by_patches(here: Tensor, there: Tensor) -> Tensor:
    """All sums of `here` with the windows of `there`: `[lags, channels, channels]`."""
    dims, channels = here.dim() - 2, here.shape[1]
    for axis in range(2, 2 + dims):
        there = there.unfold(axis, here.shape[axis], 1)
    lags, pixels = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    rows = here.transpose(0, 1).reshape(channels, -1)
    met = there.permute(*lags, 1, 0, *pixels).reshape(-1, rows.shape[1])
    return (met @ rows.t()).view(-1, channels, channels).mT


def _by_convolution(here: Tensor, there: Tensor) -> Tensor:
    """As `_by_patches`, without forming them."""
    channels, dims = here.shape[1], here.dim() - 2
    lengths = [b - a + 1 for a, b in zip(here.shape[2:], there.shape[2:], strict=True)]
    sums = WEIGHT_GRADIENTS[dims](there, [channels, channels, *lengths], here)
    return sums.flatten(2).permute(2, 0, 1)


def _prefers_fourier(x: Tensor, lags: Sequence[range]) -> bool:
    """Whether `_by_fourier` multiplies less; a product's entries cost as much as 40, being written, read
    and transformed. Convolutions of few channels take as long as of 16."""
    if len(lags) != 2 or x.device.type != "cpu":
        return False
    n, channels, *lengths = x.shape
    height, width = (length + max(one) for length, one in zip(lengths, lags, strict=True))
    transforms = n * channels * lengths[0] * width * (lengths[1] + 2 * height)
    products = height * width * channels**2 * (1.5 * n + 40)
    shifts = math.prod(len(one) for one in lags) * math.prod(x.shape) * max(channels, 16)
    return transforms + products < shifts


def _by_fourier(x: Tensor, of: _Sum) -> Tensor:
    """Sums over the frequencies of whole images instead of over their pixels: one product per frequency
    stands for all lags (Wiener–Khinchin). The discrete transforms are products with small matrices, of
    periods so long that no pixel meets one from the other side.
    """
    n, channels, height, width = x.shape
    across, down, down_imaginary, even, odd = (
        on_device(matrix, x.device, x.dtype) for matrix in _waves(of, height, width)
    )
    columns, rows = across.shape[0] // 2, down.shape[0] // 2
    lines = (across @ x.reshape(-1, width).t()).view(columns, 2, n * channels, height)
    total, turned = x.new_zeros(2, len(of.kept), channels**2)
    size = max(1, _PIECE // (2 * rows * channels * max(n, channels)))
    for start in range(0, columns, size):
        real, imaginary = lines[start : start + size].unbind(1)
        image = (down @ real.mT).add_(down_imaginary @ imaginary.mT).view(-1, 2 * n, channels)
        at = slice(start * rows, start * rows + len(image))
        total.addmm_(even[:, at], (image.mT @ image).flatten(1))
        turned.addmm_(odd[:, at], (image[:, :n].mT @ image[:, n:]).flatten(1))
    turned = turned.view(-1, channels, channels)
    return total.view_as(turned).add_(turned).sub_(turned.mT)


@lru_cache(maxsize=256)
def _waves(of: _Sum, height: int, width: int) -> tuple[Array, ...]:
    """Matrices that take images to their transform, and products of transforms to sums: `across
    [columns·2, width]`, `down [rows·2, height]` for what `across` made real and imaginary, `even` and
    `odd` `[kept, columns·rows]`."""
    lags = [np.array(one) for one in of.lags]
    periods = [
        length + np.abs(one).max() for length, one in zip((height, width), lags, strict=True)
    ]
    rows, columns = np.arange(periods[0]), np.arange(periods[1] // 2 + 1)
    cos, sin = _cos_sin(columns, np.arange(width), periods[1])
    across = np.stack((cos, -sin), 1).reshape(-1, width)
    cos, sin = _cos_sin(rows, np.arange(height), periods[0])
    down = np.stack((cos, -sin), 1).reshape(-1, height)
    down_imaginary = np.stack((sin, cos), 1).reshape(-1, height)
    # What is real has the same at the opposite frequency.
    counts = np.where((columns == 0) | (2 * columns == periods[1]), 1, 2) / math.prod(periods)
    angles = [
        2 * np.pi * np.outer(one, each) / period
        for one, each, period in zip(lags, (rows, columns), periods, strict=True)
    ]
    both = angles[0][:, None, None, :] + angles[1][None, :, :, None]  # [lag, lag, column, row]
    both, counts = both.reshape(-1, len(columns), len(rows))[list(of.kept)], counts[:, None]
    even, odd = (
        wave.reshape(len(both), -1) for wave in (counts * np.cos(both), -counts * np.sin(both))
    )
    return across, down, down_imaginary, even, odd


def _cos_sin(frequencies: NDArray[Any], places: NDArray[Any], period: int) -> tuple[Array, Array]:
    """`[frequencies, places]`, with zeros where rounding leaves so little that products are denormal."""
    angles = 2 * np.pi / period * (np.outer(frequencies, places) % period)
    cos, sin = (
        np.where(np.abs(wave) < 1e-12, 0, wave) for wave in (np.cos(angles), np.sin(angles))
    )
    return cos, sin
