"""Damping: how the Tikhonov term is split over two factors, and a rule that adapts it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elastic_kfac.config.kfac import LevenbergMarquardt

_ROUNDING = 16
"""Noise then is at most about a tenth of the step."""


def mean_eigenvalue(factor: Tensor) -> Tensor:
    """`tr X / dim X` of a factor `[..., d, d]` or of a diagonal `[d]`."""
    if factor.dim() == 1:
        return factor.mean()
    return factor.diagonal(dim1=-2, dim2=-1).mean(-1)


def typical_eigenvalue(factor: Tensor, *, blocks: bool = False) -> Tensor:
    """`Σλ² / Σλ` of a factor: the largest eigenvalue of one of rank 1, at most that of others.

    With `blocks`, of the block-diagonal matrix that `[..., b, s, s]` stands for.
    """
    if factor.dim() == 1:
        squares, trace = factor.square().sum(), factor.sum()
    else:
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        # The lower triangle alone, as for decompositions.
        squares = 2 * factor.tril(-1).square_().sum((-2, -1)) + diagonal.square().sum(-1)
        trace = diagonal.sum(-1)
        if blocks:
            squares, trace = squares.sum(-1), trace.sum(-1)
    return squares / trace.clamp(min=torch.finfo(factor.dtype).tiny)


def least_damping(eigenvalue: Tensor, dtype: torch.dtype) -> Tensor:
    """The least γ beside a large eigenvalue, for gradients that are exact to the precision of `dtype`.

    A gradient along that eigenvector leaves its rounding in all others, where `1/γ` magnifies it: in
    float32 a smaller γ would return more noise than step.
    """
    return eigenvalue * (_ROUNDING * torch.finfo(dtype).eps)


def smallest_eigenvalue(factor: Tensor) -> Tensor:
    """The smallest eigenvalue of a factor `[..., d, d]` or of a diagonal `[d]`; at least 0."""
    values = factor if factor.dim() == 1 else torch.linalg.eigvalsh(factor)
    return values.amin(-1).clamp(min=0)


def split_damping(
    means: Sequence[Tensor],
    widths: Sequence[int],
    typical: Callable[[], Sequence[Tensor]],
    damping: float,
    mode: str,
    smallest: Callable[[], Sequence[Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """γ_A and γ_G of the factored Tikhonov form (Martens and Grosse 2015, section 6.3), from the
    `mean_eigenvalue`, the width and the `typical_eigenvalue` of A and G.

    `pi`: γ_A = π√γ, γ_G = √γ/π with π² = (tr A / dim A) / (tr G / dim G); `sqrt`: π = 1; `plain`:
    γ_A = γ_G = γ, which does not approximate (A ⊗ G + γI)⁻¹ but is what published code does.

    But with `plain`, both are raised until rounding is no more than noise: the smallest eigenvalue of
    what is inverted, (λ_A + γ_A)(λ_G + γ_G), is at least an eighth of `least_damping`. What `typical` and
    `smallest` (λ_A and λ_G; 0 without it) compute is only needed where that may be.
    """
    a_mean, g_mean = means
    one = torch.ones((), dtype=a_mean.dtype, device=a_mean.device)
    if mode == "plain":
        return one * damping, one * damping
    root = math.sqrt(damping)
    pi = torch.ones_like(a_mean) if mode == "sqrt" else (a_mean / g_mean).sqrt()
    # A factor that is all zero (a dead layer) has no balance.
    pi = torch.where((a_mean > 0) & (g_mean > 0), pi, torch.ones_like(pi))
    # No eigenvalue is larger than the trace.
    bounds = [mean * width for mean, width in zip(means, widths, strict=True)]
    raised = torch.ones_like(pi)
    if bool((_least_of_both(bounds) > damping).any()):
        least = _least_of_both(typical())
        raised = (least / damping).clamp(min=1.0).sqrt()
    if smallest is not None and bool((raised > 1).any()):
        # r >= 1 with (λ_A + r γ_A)(λ_G + r γ_G) = least, where γ_A γ_G = γ; conditioned well, r is 1.
        a_least, g_least = smallest()
        linear = pi * root * g_least + root / pi * a_least
        lacking = (least - a_least * g_least).clamp(min=0)
        raised = 2 * lacking / (linear + (linear.square() + 4 * damping * lacking).sqrt())
        raised = raised.nan_to_num(1.0).clamp(min=1.0)
    return pi * root * raised, root / pi * raised


def _least_of_both(eigenvalues: Sequence[Tensor]) -> Tensor:
    """An eighth of `least_damping`: the root damps large eigenvalues of one factor, too."""
    return least_damping(eigenvalues[0] * eigenvalues[1], eigenvalues[0].dtype) / 8


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
