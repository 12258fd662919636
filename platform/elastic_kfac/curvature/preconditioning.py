"""Applying decompositions to gradients, and the KL clip. Matrices are `[..., g, a]` (see factors.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def eigen_precondition(
    gradient: Tensor,
    a_vectors: Tensor | None,
    g_vectors: Tensor,
    a_values: Tensor | None,
    g_values: Tensor | None,
    damping: float,
    reciprocal: Tensor | None = None,
) -> Tensor:
    """`(A ⊗ G + γI)⁻¹ vec(D)` exactly: `Q_G [(Q_Gᵀ D Q_A) / (d_G d_Aᵀ + γ)] Q_Aᵀ` (spec 1.1).

    Args:
        gradient: D `[..., g, a]`.
        a_vectors: Q_A `[..., a, a]`, or None for a diagonal A (Embedding).
        g_vectors: Q_G `[..., g, g]`.
        a_values: `[..., a]`; not needed with a reciprocal.
        g_values: `[..., g]`; likewise.
        damping: γ.
        reciprocal: `1 / (d_G d_Aᵀ + γ)` when precomputed.
    """
    rotated = g_vectors.mT @ gradient
    if a_vectors is not None:
        rotated = rotated @ a_vectors
    if reciprocal is None:
        assert a_values is not None and g_values is not None
        rotated = rotated / eigen_denominator(a_values, g_values, damping)
    else:
        rotated = rotated * reciprocal
    result = g_vectors @ rotated
    return result if a_vectors is None else result @ a_vectors.mT


def eigen_denominator(a_values: Tensor, g_values: Tensor, damping: float) -> Tensor:
    """`d_G d_Aᵀ + γ` `[..., g, a]`."""
    return (g_values.unsqueeze(-1) * a_values.unsqueeze(-2)).add_(damping)


def inverse_precondition(gradient: Tensor, a_inverse: Tensor, g_inverse: Tensor) -> Tensor:
    """`(G + γ_G I)⁻¹ D (A + γ_A I)⁻¹`; a one-dimensional `a_inverse` is a diagonal."""
    rows = g_inverse @ gradient
    return rows * a_inverse if a_inverse.dim() == 1 else rows @ a_inverse


def inner_products(preconditioned: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """`⟨P_i, D_i⟩` per layer as float64 `[layers]`, without reading anything back to the host."""
    return torch.stack(
        [
            torch.dot(p.reshape(-1), d.reshape(-1)).double()
            for p, d in zip(preconditioned, gradients, strict=True)
        ]
    )


def kl_clip_scale(products: Tensor, learning_rates: Sequence[float], kl_clip: float) -> Tensor:
    """`ν = min(1, sqrt(κ / Σ_i lr_i² |⟨P_i, D_i⟩|))` as a float64 scalar tensor (spec 1.1).

    The sum runs over layers in the given order in float64, so that every rank that holds the same
    products gets the same bits.
    """
    rates = torch.tensor(learning_rates, dtype=torch.float64, device=products.device)
    total = (products.abs() * rates.square()).sum()
    scale = (kl_clip / total).sqrt().clamp_(max=1.0)
    return torch.where(total > 0, scale, torch.ones_like(scale))
