"""Damping: how the Tikhonov term is split over two factors, and a rule that adapts it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elastic_kfac.config.kfac import LevenbergMarquardt


def mean_eigenvalue(factor: Tensor) -> Tensor:
    """`tr X / dim X` of a factor `[..., d, d]` or of a diagonal `[d]`."""
    if factor.dim() == 1:
        return factor.mean()
    return factor.diagonal(dim1=-2, dim2=-1).mean(-1)


def split_damping(
    a_factor: Tensor, g_factor: Tensor, damping: float, mode: str
) -> tuple[Tensor, Tensor]:
    """γ_A and γ_G of the factored Tikhonov form (Martens and Grosse 2015, section 6.3).

    `pi`: γ_A = π√γ, γ_G = √γ/π with π² = (tr A / dim A) / (tr G / dim G); `sqrt`: π = 1; `plain`:
    γ_A = γ_G = γ, which does not approximate (A ⊗ G + γI)⁻¹ but is what published code does.
    """
    one = torch.ones((), dtype=a_factor.dtype, device=a_factor.device)
    if mode == "plain":
        return one * damping, one * damping
    root = math.sqrt(damping)
    if mode == "sqrt":
        return one * root, one * root
    a_mean, g_mean = mean_eigenvalue(a_factor), mean_eigenvalue(g_factor)
    pi = (a_mean / g_mean).sqrt()
    # A factor that is all zero (a dead layer) has no balance.
    pi = torch.where((a_mean > 0) & (g_mean > 0), pi, torch.ones_like(pi))
    return pi * root, root / pi


class AdaptiveDamping:
    """The state of the Levenberg–Marquardt rule (Martens and Grosse 2015, section 6.5).

    With reduction ratio ρ = (L(θ+δ) − L(θ)) / (M(δ) − M(0)): ρ < 1/4 divides γ by ω^interval (more
    damping), ρ > 3/4 multiplies by it (less).
    """

    def __init__(self, rule: LevenbergMarquardt) -> None:
        self.rule = rule
        self.value = rule.initial

    def update(self, actual_change: float, predicted_change: float) -> float:
        """Adapts to one pair of loss changes (both negative for a good step); returns ρ.

        A loss that is not finite counts as no reduction; without a predicted change γ stays.
        """
        if predicted_change == 0:
            return math.nan
        ratio = actual_change / predicted_change
        if not math.isfinite(ratio):
            ratio = -math.inf
        change = self.rule.omega**self.rule.interval
        if ratio < 0.25:
            self.value = min(self.value / change, self.rule.maximum)
        elif ratio > 0.75:
            self.value = max(self.value * change, self.rule.minimum)
        return ratio
