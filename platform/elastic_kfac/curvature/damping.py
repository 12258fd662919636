"""Damping: how the Tikhonov term is split over two factors, and rules that change it over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_kfac.errors import ConfigError

Scheduled = float | Callable[[int], float]


def scheduled_value(value: Scheduled, step: int) -> float:
    """The value of a number or of a function of the step."""
    return float(value(step)) if callable(value) else float(value)


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
    γ_A = γ_G = γ, which is not an approximation of (A ⊗ G + γI)⁻¹ (spec 1.1) but what the KAISA
    slide writes.
    """
    one = torch.ones((), dtype=a_factor.dtype, device=a_factor.device)
    if mode == "plain":
        return one * damping, one * damping
    root = math.sqrt(damping)
    if mode == "sqrt":
        return one * root, one * root
    a_mean, g_mean = mean_eigenvalue(a_factor), mean_eigenvalue(g_factor)
    pi = (a_mean / g_mean).sqrt()
    # A factor that is all zero (a dead layer) says nothing about the balance.
    pi = torch.where((a_mean > 0) & (g_mean > 0), pi, torch.ones_like(pi))
    return pi * root, root / pi


@dataclass(frozen=True)
class DampingWarmup:
    """γ_{k+1} = (1 − c) γ_k + c γ_target, c = 2·log10(γ_0/γ_target)/T_warm (Osawa et al. 2019)."""

    start: float
    target: float
    warmup_steps: int

    def __call__(self, step: int) -> float:
        rate = 2 * math.log10(self.start / self.target) / self.warmup_steps
        rate = min(max(rate, 0.0), 1.0)
        return self.target + (self.start - self.target) * (1 - rate) ** step


@dataclass(frozen=True)
class StepwiseDecay:
    """`start · factor^(number of milestones passed)` (the KAISA examples: factor 0.5)."""

    start: float
    factor: float
    milestones: tuple[int, ...]

    def __call__(self, step: int) -> float:
        return self.start * self.factor ** sum(step >= m for m in self.milestones)


class LevenbergMarquardt:
    """Damping that follows how well the quadratic model predicts the loss (Martens and Grosse 2015).

    Every `interval` steps, with reduction ratio ρ = (L(θ+δ) − L(θ)) / (M(δ) − M(0)): ρ < 1/4 divides
    by ω^interval (more damping), ρ > 3/4 multiplies by it (less). Pass it as `damping` of `KFAC` and
    call `update` with the measured and the predicted change.
    """

    def __init__(
        self,
        initial: float,
        *,
        omega: float = 0.95,
        interval: int = 5,
        minimum: float = 1e-8,
        maximum: float = 1e8,
    ) -> None:
        if not 0 < omega < 1:
            raise ConfigError("omega is out of range", given=omega, allowed="between 0 and 1")
        if not minimum <= initial <= maximum:
            raise ConfigError(
                "initial is out of range", given=initial, allowed=f"{minimum}..{maximum}"
            )
        self.value = initial
        self.omega = omega
        self.interval = interval
        self.minimum = minimum
        self.maximum = maximum

    def __call__(self, step: int) -> float:
        return self.value

    def update(self, actual_change: float, predicted_change: float) -> float:
        """Adapts to one pair of loss changes (both negative for a good step); returns ρ.

        Raises:
            ConfigError: If the model predicted no change at all.
        """
        if predicted_change == 0:
            raise ConfigError(
                "the predicted change of the loss is zero", allowed="a non-zero number"
            )
        ratio = actual_change / predicted_change
        if not math.isfinite(ratio):
            ratio = -math.inf
        change = self.omega**self.interval
        if ratio < 0.25:
            self.value = min(self.value / change, self.maximum)
        elif ratio > 0.75:
            self.value = max(self.value * change, self.minimum)
        return ratio

    def state_dict(self) -> dict[str, float]:
        """The current value; everything else is configuration."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continues from a saved value."""
        self.value = float(state["value"])
