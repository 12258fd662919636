"""How a side of weight matrices `[..., g, a]` keeps its factor: whole, in blocks, or as its diagonal; and
how it keeps its spectrum.

A factor as wide as a vocabulary or a flattened image fits no memory, and its decomposition no step. What
is kept of it is the block diagonal of a narrower structure; all that follows is exactly K-FAC with the
other entries set to zero. Kept shapes, with the groups of a grouped convolution in front:

    Whole     [d, d]
    Blocks    [b, s, s]   b·s >= d: the last block is padded with zeros
    Diagonal  [d]
    LowRank   [d, d], of whose eigendecomposition r pairs are kept and the mean of the other eigenvalues
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kfac import host
from elastic_kfac.curvature import damping, inverses

Shape = tuple[int, ...]

_DIAGONAL_FROM = 8
"""Multiple of the limit."""

_EQUAL = 1e-5
"""Of the largest eigenvalue: those that differ by less are equal."""

_SHARE = 16
"""Blocks together take this part of the memory of a whole factor at the limit."""


@dataclass(frozen=True)
class Side(ABC):
    """One side of a layer's weight matrices."""

    width: int
    """d, with the coordinates of biases, which are the last."""
    bias_at: int | None = field(default=None, kw_only=True)
    """The coordinate of the bias; None is the last one."""

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Of the factor."""

    @property
    def values_shape(self) -> Shape:
        """Of its eigenvalues."""
        return self.shape[:-1]

    @property
    def vectors_shape(self) -> Shape | None:
        """Of its eigenvectors; None where those are unit vectors."""
        return self.shape

    @property
    def coordinates(self) -> int:
        """Length of a side of matrices in coordinates of the eigenvectors."""
        return self.padded

    @property
    def padded(self) -> int:
        """Length of a side of the matrices that `left` and `right` take."""
        return self.width

    @property
    def kept(self) -> str:
        """What is kept, in words; empty for all of it."""
        return ""

    # -- statistics -----------------------------------------------------------------------------

    @abstractmethod
    def gram(self, rows: Tensor) -> Tensor:
        """What is kept of `Σ r rᵀ` over `rows [..., d, m]`; without the coordinate of a bias it can be
        `bordered` with that."""

    def bordered_gram(self, rows: Tensor) -> Tensor:
        """`bordered(gram(rows), …)` of `rows [d, m]` without the coordinate of the bias."""
        return self.bordered(self.gram(rows), rows.sum(-1), rows.shape[-1])

    @abstractmethod
    def bordered(self, core: Tensor, sums: Tensor, count: float) -> Tensor:
        """A factor from one without biases, the sums of its rows `[..., inputs]` and their count."""

    @abstractmethod
    def widened(self, core: Tensor) -> Tensor:
        """A factor from one without biases, with zeros for them; others as they are."""

    def identity(self, like: Tensor) -> Tensor:
        """I, without groups."""
        return self.gram(torch.eye(self.width, dtype=like.dtype, device=like.device))

    # -- curvature ------------------------------------------------------------------------------

    def mean_eigenvalue(self, factor: Tensor) -> Tensor:
        """`tr X / d`."""
        return damping.mean_eigenvalue(factor)

    def typical_eigenvalue(self, factor: Tensor) -> Tensor:
        """`Σλ² / Σλ`."""
        return damping.typical_eigenvalue(factor)

    def smallest_eigenvalue(self, factor: Tensor) -> Tensor:
        """The smallest one; that of the zeros around blocks, where there are some."""
        return damping.smallest_eigenvalue(factor)

    def eigen(self, factor: Tensor, last: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues, and eigenvectors if there are other than unit vectors.

        `last` are the eigenvectors of an earlier factor.
        """
        return inverses.eigen(factor)

    def inverse(self, factor: Tensor, shift: Tensor) -> Tensor:
        """`(X + γI)⁻¹`; γ is a scalar or one value per group."""
        return inverses.damped_inverse(factor, shift)

    def values(self, eigenvalues: Tensor) -> Tensor:
        """Eigenvalues along a side of a matrix in coordinates of the eigenvectors."""
        return eigenvalues

    def pooled(self, x: Tensor, values: Tensor) -> Tensor:
        """`x [..., k, padded]`, in coordinates of the eigenvectors, with its mean in all those of the
        least eigenvalue: rounding alone decides which vectors they are, as with zeros."""
        least, largest = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        chosen = (values <= least + _EQUAL * largest).unsqueeze(-2)
        mean = (x * chosen).sum(-1, keepdim=True) / chosen.sum(-1, keepdim=True)
        return torch.where(chosen, mean, x)

    def left(self, matrix: Tensor, x: Tensor) -> Tensor:
        """`M X` for `x [..., padded, k]`, with M as it is kept."""
        return multiplied(matrix, x)

    def right(self, x: Tensor, matrix: Tensor) -> Tensor:
        """`X M` for `x [..., k, padded]`."""
        return multiplied(x, matrix)

    def left_onto(self, vectors: Tensor, x: Tensor) -> Tensor:
        """Coordinates `[..., coordinates, k]` of the columns of `x [..., padded, k]`."""
        return self.left(vectors.mT, x)

    def left_back(self, vectors: Tensor, x: Tensor) -> Tensor:
        """Undoes `left_onto`."""
        return self.left(vectors, x)

    def right_onto(self, x: Tensor, vectors: Tensor) -> Tensor:
        """Coordinates `[..., k, coordinates]` of the rows of `x [..., k, padded]`."""
        return self.right(x, vectors)

    def right_back(self, x: Tensor, vectors: Tensor) -> Tensor:
        """Undoes `right_onto`."""
        return self.right(x, vectors.mT)

    # -- pieces ---------------------------------------------------------------------------------

    def spans(self, length: int, total: int) -> list[slice]:
        """About `length` coordinates each, of `total`, without any entry of the factor between them."""
        return [slice(0, total)]

    def piece(self, span: slice, width: int) -> Side:
        """The side of the coordinates of a span."""
        return replace(self, width=width)

    def part(self, kept: Tensor, span: slice) -> Tensor:
        """What belongs to a span, of a tensor with the shape of a factor or of its eigenvalues."""
        return kept


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    """`A B`. On processors by AMD a large product takes up to a third less time with zeros up to
    multiples of 8 (a bias makes sides odd); on others it takes longer by the copies."""
    (rows, inner), outer = a.shape[-2:], b.shape[-1]
    lacking, beyond = -inner % 8, -outer % 8
    is_large = rows >= _MANY and rows * inner * outer >= _LARGE
    is_padded = is_large and (lacking or beyond) and a.device.type == "cpu"
    if not (is_padded and host.processor_name().startswith("AMD")):
        return a @ b
    product = (F.pad(a, (0, lacking)) if lacking else a) @ F.pad(b, (0, beyond, 0, lacking))
    return product[..., :outer].contiguous()


_MANY, _LARGE = 512, 200_000_000
"""Rows and multiplications from which copies of both matrices cost less than they gain."""


class Whole(Side):
    """All of the factor."""

    @property
    def shape(self) -> Shape:
        return (self.width, self.width)

    def gram(self, rows: Tensor) -> Tensor:
        if not _is_halved(rows, _LONG):
            return rows @ rows.mT
        return _gram_into(rows.new_empty(*rows.shape[:-1], rows.shape[-2]), rows, _LONG)

    def bordered_gram(self, rows: Tensor) -> Tensor:
        d, m = rows.shape
        if d < _WIDE:
            # Narrow layers are summed in stacks, with the bits that they have one by one: those of a
            # product depend on the layout of the result.
            return super().bordered_gram(rows)
        full = self._border(rows, d, rows.sum(-1), m)
        _gram_into(full[:d, :d], rows, _LONG_BORDERED)
        return full

    def bordered(self, core: Tensor, sums: Tensor, count: float) -> Tensor:
        d = core.shape[-1]
        full = self._border(core, d, sums, count)
        full[..., :d, :d] = core
        return full

    def _border(self, like: Tensor, inputs: int, sums: Tensor, count: float) -> Tensor:
        """A factor, all but what is of inputs alone."""
        place = inputs if self.bias_at is None else self.bias_at
        width = max(self.width, inputs + 1)
        shape = (*sums.shape[:-1], width, width)
        # Zeros for the biases of other uses of a shared weight.
        full = like.new_zeros(shape) if width > inputs + 1 else like.new_empty(shape)
        full[..., :inputs, place] = sums
        full[..., place, :inputs] = sums
        full[..., place, place] = count
        return full

    def widened(self, core: Tensor) -> Tensor:
        lacking = self.width - core.shape[-1]
        return F.pad(core, (0, lacking, 0, lacking)) if lacking else core


def _is_halved(rows: Tensor, long: int) -> bool:
    d, m = rows.shape[-2:]
    return d >= _WIDE and m >= long and d * m >= _MANY_ENTRIES and rows.device.type == "cpu"


def _gram_into(total: Tensor, rows: Tensor, long: int) -> Tensor:
    """`Σ r rᵀ` in a part of a larger matrix; by halves from so many rows on."""
    if not _is_halved(rows, long):
        return torch.matmul(rows, rows.mT, out=total)
    # Above the diagonal is a copy of what is below.
    half = rows.shape[-2] // 2
    upper, lower = rows[..., :half, :], rows[..., half:, :]
    _gram_into(total[..., :half, :half], upper, long)
    _gram_into(total[..., half:, half:], lower, long)
    below = torch.matmul(lower, upper.mT, out=total[..., half:, :half])
    total[..., :half, half:] = below.mT
    return total


_WIDE, _MANY_ENTRIES = 256, 1 << 16
_LONG, _LONG_BORDERED = 512, 64
"""Width, entries and number of rows from which computing a Gram matrix by halves takes less time on the
host. With the coordinate of a bias the lines of the result do not lie a large power of 2 apart."""

WHOLE = Whole(0)
"""A whole side of any width, for statistics."""


@dataclass(frozen=True)
class LowRank(Whole):
    """All of the factor, decomposed as `V Λ Vᵀ + τ (I − V Vᵀ)`: the largest r eigenpairs and, in every
    other direction, the mean τ of the rest, so that the trace is kept. Never with groups.

    Coordinates of x are `Vᵀx` and, behind them, `x − V Vᵀx`.
    """

    rank: int
    """r < d."""

    @property
    def values_shape(self) -> Shape:
        return (self.rank + 1,)

    @property
    def vectors_shape(self) -> Shape:
        return (self.width, self.rank)

    @property
    def coordinates(self) -> int:
        return self.rank + self.width

    @property
    def kept(self) -> str:
        return f"{self.rank} eigenpairs and the mean of the others"

    def eigen(self, factor: Tensor, last: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        values, vectors = inverses.leading_eigen(factor, self.rank, last)
        trace = factor.diagonal(dim1=-2, dim2=-1).sum(-1)
        tail = (trace - values.sum(-1)).clamp(min=0) / (self.width - self.rank)
        return torch.cat((values, tail.unsqueeze(-1)), -1), vectors

    def values(self, eigenvalues: Tensor) -> Tensor:
        top, tail = eigenvalues[..., :-1], eigenvalues[..., -1:]
        return torch.cat((top, tail.expand(*tail.shape[:-1], self.width)), -1)

    def left_onto(self, vectors: Tensor, x: Tensor) -> Tensor:
        inside = vectors.mT @ x
        return torch.cat((inside, x - vectors @ inside), -2)

    def left_back(self, vectors: Tensor, x: Tensor) -> Tensor:
        return vectors @ x[..., : self.rank, :] + x[..., self.rank :, :]

    def right_onto(self, x: Tensor, vectors: Tensor) -> Tensor:
        inside = x @ vectors
        return torch.cat((inside, x - inside @ vectors.mT), -1)

    def right_back(self, x: Tensor, vectors: Tensor) -> Tensor:
        return x[..., : self.rank] @ vectors.mT + x[..., self.rank :]


@dataclass(frozen=True)
class Blocks(Side):
    """Equal blocks on the diagonal."""

    size: int
    """s."""

    @property
    def count(self) -> int:
        """b."""
        return -(-self.width // self.size)

    @property
    def shape(self) -> Shape:
        return (self.count, self.size, self.size)

    @property
    def padded(self) -> int:
        return self.count * self.size

    @property
    def kept(self) -> str:
        return f"{self.count} blocks of {self.size}"

    def _blocks(self, rows: Tensor) -> Tensor:
        """`[..., d, m]` to `[..., b, s, m]`."""
        lacking = self.padded - rows.shape[-2]
        rows = F.pad(rows, (0, 0, 0, lacking)) if lacking else rows
        return rows.unflatten(-2, (self.count, self.size))

    def gram(self, rows: Tensor) -> Tensor:
        rows = self._blocks(rows)
        return rows @ rows.mT

    def bordered(self, core: Tensor, sums: Tensor, count: float) -> Tensor:
        bias_at = self.width - 1 if self.bias_at is None else self.bias_at
        block, place = divmod(bias_at, self.size)
        core = self.widened(core)
        own = sums[..., block * self.size : bias_at]
        inputs, its = own.shape[-1], core[..., block, :, :]
        its[..., place, :inputs] = own
        its[..., :inputs, place] = own
        its[..., place, place] = count
        return core

    def widened(self, core: Tensor) -> Tensor:
        lacking = self.count - core.shape[-3]
        return F.pad(core, (0, 0, 0, 0, 0, lacking)) if lacking else core

    def mean_eigenvalue(self, factor: Tensor) -> Tensor:
        return factor.diagonal(dim1=-2, dim2=-1).sum((-2, -1)) / self.width

    def typical_eigenvalue(self, factor: Tensor) -> Tensor:
        return damping.typical_eigenvalue(factor, blocks=True)

    def smallest_eigenvalue(self, factor: Tensor) -> Tensor:
        return damping.smallest_eigenvalue(factor).amin(-1)

    def inverse(self, factor: Tensor, shift: Tensor) -> Tensor:
        return inverses.damped_inverse(factor, shift.unsqueeze(-1).expand(factor.shape[:-2]))

    def values(self, eigenvalues: Tensor) -> Tensor:
        return eigenvalues.flatten(-2)

    def pooled(self, x: Tensor, values: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (self.count, self.size)).transpose(-3, -2)
        return super().pooled(blocks, values).transpose(-3, -2).flatten(-2)

    def spans(self, length: int, total: int) -> list[slice]:
        return _spans(max(1, length // self.size) * self.size, total)

    def part(self, kept: Tensor, span: slice) -> Tensor:
        return kept[span.start // self.size : -(-span.stop // self.size)]

    def left(self, matrix: Tensor, x: Tensor) -> Tensor:
        return (matrix @ x.unflatten(-2, (self.count, self.size))).flatten(-3, -2)

    def right(self, x: Tensor, matrix: Tensor) -> Tensor:
        split = (self.count, self.size)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        # Written where it belongs, which saves a pass over the result.
        torch.matmul(
            x.unflatten(-1, split).transpose(-3, -2),
            matrix,
            out=result.unflatten(-1, split).transpose(-3, -2),
        )
        return result


@dataclass(frozen=True)
class Diagonal(Side):
    """The diagonal alone. Never with groups."""

    is_whole: bool = False
    """Whether there is nothing else: that of one-hot inputs."""

    @property
    def shape(self) -> Shape:
        return (self.width,)

    @property
    def values_shape(self) -> Shape:
        return self.shape

    @property
    def vectors_shape(self) -> None:
        return None

    @property
    def kept(self) -> str:
        return "" if self.is_whole else "the diagonal"

    def gram(self, rows: Tensor) -> Tensor:
        return rows.square().sum(-1)

    def bordered(self, core: Tensor, sums: Tensor, count: float) -> Tensor:
        full = self.widened(core)
        full[-1 if self.bias_at is None else self.bias_at] = count
        return full

    def widened(self, core: Tensor) -> Tensor:
        lacking = self.width - core.shape[-1]
        return F.pad(core, (0, lacking)) if lacking else core

    def identity(self, like: Tensor) -> Tensor:
        return torch.ones(self.width, dtype=like.dtype, device=like.device)

    def eigen(self, factor: Tensor, last: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return factor.clone(), None

    def inverse(self, factor: Tensor, shift: Tensor) -> Tensor:
        return 1.0 / (factor + shift)

    def pooled(self, x: Tensor, values: Tensor) -> Tensor:
        return x

    def spans(self, length: int, total: int) -> list[slice]:
        return _spans(max(1, length), total)

    def part(self, kept: Tensor, span: slice) -> Tensor:
        return kept[span]

    def left(self, matrix: Tensor, x: Tensor) -> Tensor:
        return matrix.unsqueeze(-1) * x

    def right(self, x: Tensor, matrix: Tensor) -> Tensor:
        return x * matrix.unsqueeze(-2)


def _spans(length: int, total: int) -> list[slice]:
    return [slice(first, first + length) for first in range(0, total, length)]


def bounded(
    width: int,
    limit: int | None,
    *,
    biases: int = 0,
    unit: int = 1,
    groups: int = 1,
    many_positions: bool = False,
    rank: int | None = None,
) -> Side:
    """The side of a given width under `max_factor_dim`.

    Wider sides are cut into blocks that take, together, a sixteenth of the memory of a whole factor of
    `limit`: a plain step costs a multiple of their size per weight, and stays under 3 times SGD's.
    Sides of more than 8 times the limit keep the diagonal: blocks would be tiny. Where a layer has many
    positions per sample its own passes cost far more per weight: blocks are half as wide as the limit.
    With `rank`, wide sides are `LowRank` instead of blocks.

    Args:
        width: d, with the coordinates of biases.
        limit: Widest side that is kept whole, biases not counted.
        biases: Number of these coordinates.
        unit: Coordinates that belong together (the kernel offsets of a channel): blocks hold whole units.
        groups: Of a grouped convolution, which keep blocks always.
        many_positions: Whether the layer is a convolution.
        rank: Eigenpairs to keep of a wide side, instead of blocks; not with groups.
    """
    features = width - biases
    if limit is None or features <= limit:
        return Whole(width)
    if features > _DIAGONAL_FROM * limit and groups == 1:
        return Diagonal(width)
    if rank is not None and groups == 1:
        return LowRank(width, rank) if rank < width else Whole(width)
    size = max(1, limit // 2 if many_positions else limit * limit // (_SHARE * features))
    count = -(-features // size)
    size = -(-features // (count * unit)) * unit
    return Blocks(width, size)
