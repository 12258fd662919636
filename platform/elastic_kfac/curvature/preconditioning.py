"""The two forms of (A ⊗ G + γI)⁻¹, and the KL clip. Matrices are `[..., g, a]` (see factors.py).

A factor with one dimension is a diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_kfac.curvature import inverses
from elastic_kfac.curvature.damping import least_damping, split_damping


@dataclass(frozen=True)
class EigenForm:
    """Eigendecompositions of A and G: exact, `Q_G [(Q_Gᵀ D Q_A) / (d_G d_Aᵀ + γ)] Q_Aᵀ`.

    With `precompute` the quotient's denominator is inverted once per decomposition, which freezes γ.
    """

    precompute: bool

    def shapes(
        self, factors: Mapping[str, tuple[int, ...]], gradient: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of a decomposition, from those of the factors and of a gradient."""
        vectors = {f"{name}_vectors": shape for name, shape in factors.items() if len(shape) > 1}
        if self.precompute:
            return {**vectors, "E_reciprocal": gradient}
        # A diagonal A with a dense G belongs to an Embedding, which has no groups.
        values = {f"{name}_values": (*shape[:-2], shape[-1]) for name, shape in factors.items()}
        return {**vectors, **values}

    def decompose(
        self, factors: Mapping[str, Tensor], names: tuple[str, ...], damping: float
    ) -> dict[str, Tensor]:
        """Eigendecompositions of the named factors; all of them with `precompute`."""
        result: dict[str, Tensor] = {}
        for name in names:
            if factors[name].dim() == 1:
                result[f"{name}_values"] = factors[name].clone()
                continue
            values, vectors = inverses.eigen(factors[name])
            result[f"{name}_values"], result[f"{name}_vectors"] = values, vectors
        if self.precompute:
            a_values, g_values = result.pop("A_values"), result.pop("G_values")
            result["E_reciprocal"] = _denominator(a_values, g_values, damping).reciprocal_()
        return result

    def precondition(self, held: Mapping[str, Tensor], gradient: Tensor, damping: float) -> Tensor:
        """P from D `[..., g, a]`."""
        a_vectors, g_vectors = held.get("A_vectors"), held["G_vectors"]
        rotated = g_vectors.mT @ gradient
        if a_vectors is not None:
            rotated = rotated @ a_vectors
        if self.precompute:
            rotated = rotated * held["E_reciprocal"]
        else:
            rotated = rotated / _denominator(held["A_values"], held["G_values"], damping)
        result = g_vectors @ rotated
        return result if a_vectors is None else result @ a_vectors.mT


@dataclass(frozen=True)
class InverseForm:
    """Inverses of the damped factors: `(G + γ_G I)⁻¹ D (A + γ_A I)⁻¹`, with `split_damping`."""

    split: str

    def shapes(
        self, factors: Mapping[str, tuple[int, ...]], gradient: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the inverses, from those of the factors."""
        return {f"{name}_inverse": shape for name, shape in factors.items()}

    def decompose(
        self, factors: Mapping[str, Tensor], names: tuple[str, ...], damping: float
    ) -> dict[str, Tensor]:
        """Inverses of the named factors; the split needs both."""
        shifts = split_damping(factors["A"], factors["G"], damping, self.split)
        result = {}
        for name, shift in zip(("A", "G"), shifts, strict=True):
            if name not in names:
                continue
            factor = factors[name]
            if factor.dim() == 1:
                result[f"{name}_inverse"] = 1.0 / (factor + shift)
            else:
                result[f"{name}_inverse"] = inverses.damped_inverse(factor, shift)
        return result

    def precondition(self, held: Mapping[str, Tensor], gradient: Tensor, damping: float) -> Tensor:
        """P from D `[..., g, a]`; the damping is inside the inverses."""
        rows = held["G_inverse"] @ gradient
        a_inverse = held["A_inverse"]
        return rows * a_inverse if a_inverse.dim() == 1 else rows @ a_inverse


def _denominator(a_values: Tensor, g_values: Tensor, damping: float) -> Tensor:
    """`d_G d_Aᵀ + γ` `[..., g, a]`, at least `least_damping`."""
    largest = g_values.amax(-1) * a_values.amax(-1)
    result = (g_values.unsqueeze(-1) * a_values.unsqueeze(-2)).add_(damping)
    return result.clamp_(min=least_damping(largest, largest.dtype)[..., None, None])


def inner_products(preconditioned: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """`⟨P_i, D_i⟩` per layer as float64 `[layers]`, without a transfer to the host."""
    if not gradients:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack(
        [
            torch.dot(p.reshape(-1), d.reshape(-1)).double()
            for p, d in zip(preconditioned, gradients, strict=True)
        ]
    )


def kl_clip_scale(divergence: Tensor, kl_clip: float) -> Tensor:
    """`ν = min(1, sqrt(κ / Σ_i lr_i² |⟨P_i, D_i⟩|))`, a float64 scalar tensor (Ba et al. 2017).

    Args:
        divergence: The sum, float64. Where it is not finite no step is known to keep the bound, and
            ν is 0.
        kl_clip: κ.
    """
    scale = (kl_clip / divergence).sqrt().clamp_(max=1.0)
    scale = torch.where(divergence == 0, torch.ones_like(scale), scale)
    return torch.where(torch.isfinite(divergence), scale, torch.zeros_like(scale))
