"""Decompositions of symmetric factors: eigen form and damped Cholesky inverse, with fallbacks.

Only the lower triangle of a factor is read, so that packing it for the wire or for a checkpoint loses
nothing. Everything here runs in at least float32. A decomposition that fails is tried again in
float64 with jitter; if that fails too the caller keeps its previous one and counts the event.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kfac.errors import NumericalError

Result = TypeVar("Result")


_WIDE = 512
"""Width from which padding costs less than it gains."""


def _beyond(x: Tensor) -> int:
    """Rows and columns to add to a wide matrix on the host, up to an odd multiple of 8.

    LAPACK takes less time if rows begin at aligned addresses that do not compete for the same cache
    lines.
    """
    width = x.shape[-1]
    return (8 - width) % 16 if width >= _WIDE and x.device.type == "cpu" else 0


def _padded(x: Tensor, beyond: int, value: Tensor) -> Tensor:
    """`x [..., d, d]` with so many further rows and columns of zeros, and `value` on their diagonal."""
    width = x.shape[-1]
    x = F.pad(x, (0, beyond, 0, beyond))
    x.diagonal(dim1=-2, dim2=-1)[..., width:] = value
    return x


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at 0) `[..., d]` and eigenvectors `[..., d, d]` of a factor.

    Raises:
        NumericalError: If it fails in the factor's own precision and in float64.
    """

    def decompose(x: Tensor) -> tuple[Tensor, Tensor]:
        width, beyond = x.shape[-1], _beyond(x)
        if beyond:
            # Their eigenvalues lie below all others, which are not negative, and come first.
            mean = x.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
            x = _padded(x, beyond, -torch.where(mean == 0, 1.0, mean))
        values, vectors = torch.linalg.eigh(x)
        del x  # before the next copy of that size
        # eigh returns column-major vectors; receivers hold row-major copies, and products of the two
        # layouts differ in the last bit, so that the ranks' parameters would drift apart.
        values = values[..., beyond:].clamp(min=0)
        return values, vectors[..., :width, beyond:].contiguous()

    values, vectors = _with_fallback(decompose, matrix, "eigen-decomposition")
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


_BEYOND = 8
"""Columns that are iterated beyond the wanted ones, so that the last wanted ones converge."""

_COLD, _WARM = 8, 2
"""Iterations from random columns, and from the eigenvectors of an earlier factor."""


def leading_eigen(matrix: Tensor, rank: int, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest `rank` eigenvalues `[..., r]`, ascending, and their vectors `[..., d, r]`.

    Ritz pairs of a subspace iteration (Halko et al. 2011) that begins at `last`, the vectors of an
    earlier factor, and at random columns that are the same in every call.

    Raises:
        NumericalError: If it fails in the factor's own precision and in float64.
    """
    width = matrix.shape[-1]
    generator = torch.Generator().manual_seed(0)
    count = min(width, rank + _BEYOND) - (0 if last is None else rank)
    columns = torch.randn(width, count, generator=generator, dtype=torch.float64)

    def decompose(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.tril() + x.tril(-1).mT
        start = columns.to(x).expand(*x.shape[:-2], -1, -1)
        basis = start if last is None else torch.cat((last.to(x), start), -1)
        for _ in range(_COLD if last is None else _WARM):
            basis = torch.linalg.qr(x @ basis).Q
        values, inner = torch.linalg.eigh(basis.mT @ (x @ basis))
        values, inner = values[..., -rank:], inner[..., -rank:]
        return values.clamp_(min=0), (basis @ inner).contiguous()

    values, vectors = _with_fallback(decompose, matrix, "eigen-decomposition")
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def damped_inverse(matrix: Tensor, damping: Tensor | float) -> Tensor:
    """`(X + γI)⁻¹` by Cholesky; `damping` is a number or one value per batch entry.

    Raises:
        NumericalError: If it fails in the factor's own precision and in float64.
    """

    def invert(x: Tensor) -> Tensor:
        width, beyond = x.shape[-1], _beyond(x)
        shifted = _padded(x, beyond, torch.ones((), dtype=x.dtype)) if beyond else x.clone()
        diagonal = shifted.diagonal(dim1=-2, dim2=-1)[..., :width]
        shift = torch.as_tensor(damping, dtype=x.dtype, device=x.device)
        diagonal.add_(shift.unsqueeze(-1) if shift.dim() else shift)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        # Exactly symmetric and row-major: what a receiver unpacks from a triangle. LAPACK computes one
        # triangle, column-major, of which the other is a copy.
        if x.device.type == "cpu":
            return inverse.mT[..., :width, :width].contiguous()
        return ((inverse + inverse.mT) / 2).contiguous()

    return _with_fallback(invert, matrix, "damped inverse").to(matrix.dtype)


def two_by_two_inverse(matrix: Tensor, damping: Tensor | float) -> Tensor:
    """Closed-form `(F + γI)⁻¹` of a batch of 2x2 blocks `[features, 2, 2]`, positive definite.

    In float64, where the products of float32 entries are exact: their difference is what rank-one
    blocks cancel to. `det(F + γI) = det F + γ tr F + γ²`, and det F of a Fisher is not negative.
    `damping` is a number or one value per block.
    """
    wide = matrix.double()
    p, q, r = wide[:, 0, 0], wide[:, 1, 0], wide[:, 1, 1]
    determinant = (p * r - q * q).clamp(min=0) + damping * (p + r) + damping * damping
    # Entries that were rounded may leave q² above p·r: not so in what is inverted.
    q = q.clamp(min=-(p * r).sqrt(), max=(p * r).sqrt())
    p, r = p + damping, r + damping
    inverse = torch.stack((torch.stack((r, -q), -1), torch.stack((-q, p), -1)), -2)
    return (inverse / determinant[:, None, None]).to(matrix.dtype)


def _with_fallback(operation: Callable[[Tensor], Result], matrix: Tensor, what: str) -> Result:
    try:
        result = operation(matrix)
        if _finite(result):
            return result
    except torch.linalg.LinAlgError:
        pass
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError(f"{what} of a factor with non-finite entries", given=matrix.shape)
    wide = matrix.double().cpu()
    size = wide.shape[-1]
    jitter = 1e-8 * wide.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-30) / size
    wide.diagonal(dim1=-2, dim2=-1).add_(jitter.unsqueeze(-1))
    try:
        result = operation(wide)
    except torch.linalg.LinAlgError as error:
        raise NumericalError(f"{what} failed in float64 with jitter: {error}") from None
    if not _finite(result):
        raise NumericalError(f"{what} gave non-finite numbers in float64 with jitter")
    return _moved(result, matrix)


def _finite(result: object) -> bool:
    # One scalar per decomposition: it decides whether to retry, so it must reach the host.
    if isinstance(result, tuple):
        return all(_finite(part) for part in result)
    assert isinstance(result, Tensor)
    return bool(torch.isfinite(result.sum()))


def _moved(result: Result, like: Tensor) -> Result:
    if isinstance(result, tuple):
        return tuple(part.to(like.device) for part in result)  # type: ignore[return-value]
    assert isinstance(result, Tensor)
    return result.to(like.device)  # type: ignore[return-value]
