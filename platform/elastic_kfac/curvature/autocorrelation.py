"""Patch Gram matrices of convolutions of stride one, from the autocorrelation of their input.

Block (i, j) of A, for kernel offsets i and j, is `Σ_u x[u] x[u + j − i]ᵀ` over the pixels u that offset i
visits. The sum over all pixels depends on `j − i` only; what offset i does not visit are strips at the
border along each dimension, subtracted (and, by inclusion and exclusion, their intersections added back
and subtracted in turn). So A is a fixed linear map of a few matrices `[channels, channels]`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from elastic_kfac.curvature.factors import on_device

WEIGHT_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}

_PIECE = 1 << 20
"""Elements of what is worked on in pieces, so that it stays in the processor's caches."""

Block = tuple[int, int]
"""Kernel offsets (i, j) along one dimension, or numbers of those along all."""


class _Matrix:
    """A matrix of numbers that stays, whatever tensors it becomes."""

    def __init__(self, rows: Sequence[Iterable[float]]) -> None:
        self._entries = array("d", (entry for row in rows for entry in row))
        self._rows = len(rows)

    def like(self, x: Tensor) -> Tensor:
        """As a tensor of the dtype of `x`, where that is; it may share memory."""
        if x.device.type == "cpu":
            found = torch.frombuffer(self._entries, dtype=torch.float64).to(x.dtype)
        else:
            found = on_device(self._entries, x.device, x.dtype)
        return found.view(self._rows, -1)


class _Strip(NamedTuple):
    """Pixels along one dimension, and the lag at which they meet others."""

    start: int
    """Negative ones, and the stop then, count from the end."""
    stop: int
    lag: int

    def within(self, length: int) -> tuple[int, int]:
        """The first pixel and the one behind the last."""
        offset = length if self.start < 0 else 0
        return self.start + offset, self.stop + offset


class _Choice(NamedTuple):
    """What one dimension contributes to a sum."""

    strip: _Strip | None
    """None: all pixels."""
    lags: range
    weights: Sequence[dict[Block, int]]
    """By lag: this dimension's part in how much of the sum belongs to a block."""


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
    needed, weights = _plan(tuple(kernel), tuple(padding))
    sums = torch.cat([_sums(x, one) for one in needed])
    sums = torch.cat((sums, sums.mT))
    to_blocks = weights.like(x)
    total = x.new_empty(channels, offsets, channels, offsets)
    size = max(1, _PIECE // (channels * offsets**2))
    for start in range(0, channels, size):
        blocks = sums[:, start : start + size].flatten(1).t() @ to_blocks
        blocks = blocks.view(-1, channels, offsets, offsets)
        total[start : start + size] = blocks.transpose(1, 2)
    return total.view(channels * offsets, -1)


@lru_cache(maxsize=16)
def _plan(kernel: tuple[int, ...], padding: tuple[int, ...]) -> tuple[list[_Sum], _Matrix]:
    """The sums needed, and the weights `[sums and their transposes, i·j]` of which A consists."""
    needed: list[_Sum] = []
    weights: list[dict[Block, float]] = []
    for choice in product(*map(_choices, kernel, padding)):
        used = {}
        for lags in product(*(range(len(one.lags)) for one in choice)):
            parts = [one.weights[lag].items() for one, lag in zip(choice, lags, strict=True)]
            if found := _joint(kernel, parts):
                used[lags] = found
        if used:
            # The lags in use are consecutive.
            within = [range(min(lags), max(lags) + 1) for lags in zip(*used, strict=True)]
            needed.append(
                _Sum(
                    tuple(one.strip for one in choice),
                    tuple(
                        one.lags[its.start : its.stop]
                        for one, its in zip(choice, within, strict=True)
                    ),
                    tuple(at for at, lags in enumerate(product(*within)) if lags in used),
                )
            )
            weights += used.values()
    transposed = [{(j, i): weight for (i, j), weight in one.items()} for one in weights]
    offsets = range(math.prod(kernel))
    blocks = [(i, j) for i in offsets for j in offsets]
    rows = [[one.get(block, 0.0) for block in blocks] for one in weights + transposed]
    return needed, _Matrix(rows)


def _joint(
    kernel: Sequence[int], parts: Sequence[Iterable[tuple[Block, int]]]
) -> dict[Block, float]:
    """Weights by numbers of offsets, from those along each dimension. Blocks with j before i come from
    the transposes, and half of those with j = i."""
    found: dict[Block, float] = {}
    for combination in product(*parts):
        i = j = 0
        for k, ((first, second), _) in zip(kernel, combination, strict=True):
            i, j = i * k + first, j * k + second
        if i <= j:
            found[i, j] = math.prod(w for _, w in combination) * (0.5 if i == j else 1.0)
    return found


def _choices(kernel: int, padding: int) -> Iterator[_Choice]:
    lags, offsets = range(1 - kernel, kernel), range(kernel)
    yield _Choice(
        None, lags, [{(i, i + lag): 1 for i in offsets if i + lag in offsets} for lag in lags]
    )
    strips: dict[_Strip, dict[Block, int]] = {}
    for i, j in product(offsets, repeat=2):
        for strip in _unvisited(i, j - i, kernel, padding):
            strips.setdefault(strip, {})[i, j] = -1
    for strip, taken in strips.items():
        yield _Choice(strip, range(strip.lag, strip.lag + 1), [taken])


def _unvisited(offset: int, lag: int, kernel: int, padding: int) -> Iterator[_Strip]:
    """Pixels that an offset does not visit and that have one at a lag."""
    top, bottom = max(0, offset - padding), max(0, kernel - 1 - offset - padding)
    for start, stop in ((max(0, -lag), top), (-bottom, -max(0, lag))):
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
            start, stop = strip.within(x.shape[axis])
            here = here.narrow(axis, start, stop - start)
            there = there.narrow(axis, start + strip.lag, stop - start)
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
    met = there.permute(*lags, 1, 0, *pixels).flatten(0, dims).flatten(1)
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
        matrix.like(x) for matrix in _waves(of, height, width)
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


@lru_cache(maxsize=16)
def _waves(of: _Sum, height: int, width: int) -> tuple[_Matrix, ...]:
    """Matrices that take images to their transform, and products of transforms to sums: `across
    [columns·2, width]`, `down [rows·2, height]` for what `across` made real and imaginary, `even` and
    `odd` `[kept, columns·rows]`."""
    vertical, horizontal = of.lags
    period = height + max(map(abs, vertical))
    rows, along_rows = range(period), _circle(period)
    other = width + max(map(abs, horizontal))
    columns, along_columns = range(other // 2 + 1), _circle(other)
    across = [
        [part * along_columns(f * at)[sine] for at in range(width)]
        for f in columns
        for sine, part in ((0, 1), (1, -1))
    ]
    down, down_imaginary = (
        [
            [part * along_rows(f * at)[sine] for at in range(height)]
            for f in rows
            for sine, part in parts
        ]
        for parts in (((0, 1), (1, -1)), ((1, 1), (0, 1)))
    )
    # What is real has the same at the opposite frequency.
    counts = [(1 if f == 0 or 2 * f == other else 2) / (period * other) for f in columns]
    even, odd = [], []
    lags = list(product(vertical, horizontal))
    for v, h in (lags[at] for at in of.kept):
        first = [along_rows(f * v) for f in rows]
        second = [
            (count * c, count * s)
            for count, f in zip(counts, columns, strict=True)
            for c, s in [along_columns(f * h)]
        ]
        even.append([c * d - s * t for d, t in second for c, s in first])
        odd.append([-(s * d + c * t) for d, t in second for c, s in first])
    return tuple(map(_Matrix, (across, down, down_imaginary, even, odd)))


def _circle(period: int) -> Callable[[int], tuple[float, float]]:
    """Cosine and sine of so many parts of a full turn, with zeros where rounding would leave so little
    that products are denormal."""
    points = []
    for part in range(period):
        turn = 2 * math.pi * part / period
        cos, sin = (0.0 if abs(x) < 1e-12 else x for x in (math.cos(turn), math.sin(turn)))
        points.append((cos, sin))
    return lambda parts: points[parts % period]
