"""The adaptive trust region: a bound on the whole step, momentum included, that moves with the descent.

With c the root mean square of a sample's loss gradient at the last layer's output, taken from the first
batch, everything here is about the normalised loss L/c: its gradient is D/c, its Fisher F/c², and nothing
depends on the units of the loss. P = (F/c² + γI)⁻¹ D/c.

    floor    εg I is added to each layer's factor of output gradients, g its mean eigenvalue in the first
             batch. F of the training loss vanishes as samples are fitted; a metric that does allows any
             step, and the next sample that is wrong takes it.
    bound    ν = min(1, sqrt(κ) (1 − m) lr_t/lr_max / sqrt(Σ lr_i² ⟨P_i, D_i⟩)): momentum m adds up to
             1/(1 − m) steps, and together they are at most sqrt(κ) long in the metric of F + γI.
    growth   ρ = ⟨D_t, δ⟩ / (‖D_t‖ ‖δ‖), with δ the last step and norms in the metric of F + γI: the
             cosine between the new gradient, of other samples, and the step. On a quadratic it is 0 where
             the step went to the minimum along its direction, in noise it is about 0 on average, and −1
             where the whole step could have been repeated. α grows while its average is far below 0,
             shrinks below 1 while it is far above (steps that overshoot), and returns to 1 otherwise. The
             gradient handed to the optimizer is α ν P.
    brake    Momentum carries a step on after it has met rising ground, and the bound keeps the gradient
             from stopping it. Where ρ > 0 by more than noise, the optimizer's momentum is cut to λ m: its
             buffer is a sum of gradients handed over here, so that (1 − λ) m times it is taken out of the
             next one (adaptive restart, O'Donoghue and Candès 2015).

‖δ‖ needs no factors: δ is a sum of steps x with (F + γI) x proportional to gradients that were seen, so
s = δᵀ(F + γI)δ follows s ← (λm)² s + 2 λm αν ⟨δ, D⟩ + (αν)² ⟨P, D⟩, with δ in units of −lr. Numbers are
device scalars, equal on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from elastic_kfac.curvature.preconditioning import inner_products, kl_clip_scale

KAPPA = 1e-3
"""κ, squared length of the whole step in the Fisher metric of the normalised loss while α = 1."""
AVERAGING = 0.9
"""Weight of the old value in the average of ρ."""
GAIN = 0.5
"""log α changes by this times how far the average is beyond `DESCENT` or `OVERSHOOT`."""
DESCENT = 0.2
"""Average −ρ from which on α grows."""
PROGRESS = 0.1
"""Average −ρ below which an α above 1 returns to 1."""
RETURN = 0.95
"""What α is multiplied by then."""
OVERSHOOT = 0.2
"""Average ρ from which on α shrinks."""
REGAIN = 0.97
"""What an α below 1 is divided by while the average is negative."""
SMALLEST, LARGEST = 0.01, 30.0
"""Range of α."""
BRAKE = 0.2
"""ρ from which on momentum is cut, in proportion, to nothing at ρ = 1."""
PLAIN = 1.0
"""Longest whole step of a parameter without curvature, at the largest learning rate."""
FLOOR = 0.01
"""ε."""


@dataclass(frozen=True)
class LossScale:
    """What normalises a loss."""

    gradient: float = 1.0
    """Root mean square, over samples and positions, of the output gradient of a sample's loss."""
    positions: float = 1.0
    """Positions of a sample at the output."""

    @property
    def fisher(self) -> float:
        """F and damping are this times larger than those of the normalised loss."""
        return self.positions * self.gradient**2

    @property
    def loss(self) -> float:
        """D is this times larger than that of the normalised loss."""
        return self.positions * self.gradient


@dataclass(frozen=True)
class StepRates:
    """Of the coming step."""

    lr: Sequence[float]
    """By layer."""
    momentum: Sequence[float]
    """By layer."""


def bound(products: Tensor, rates: StepRates, largest_lr: float) -> Tensor:
    """ν from ⟨P_i, D_i⟩ of the normalised loss, float64 [layers]; 0 where they are not finite.

    Args:
        products: 0 for a layer that has no decomposition yet.
        rates: Of the coming step.
        largest_lr: What the course of the learning rate is measured by.
    """
    whole = [lr / (1.0 - m) for lr, m in zip(rates.lr, rates.momentum, strict=True)]
    size = (products.abs() * products.new_tensor(whole).square()).sum()
    relative = max(rates.lr) / largest_lr if largest_lr else 1.0
    return kl_clip_scale(size, KAPPA * relative**2)


def kl_clip(
    results: list[Tensor],
    gradients: Sequence[Tensor],
    lr: Sequence[float],
    kappa: float | None,
    total: Callable[[Tensor], Tensor],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The fixed rule (Ba et al. 2017): scales P of each layer, `results`, in place by one ν.

    Args:
        results: P.
        gradients: D of the same layers.
        lr: Their learning rates.
        kappa: κ; None for no bound.
        total: See `TrustRegion.apply`.
        device: Of the numbers.

    Returns:
        (ν, Σ ⟨P_i, D_i⟩ over these layers), float64 scalars.
    """
    products = inner_products(results, gradients).to(device)
    scale = torch.ones_like(products.sum())
    if kappa is not None:
        squares = torch.tensor(lr, dtype=torch.float64, device=device).square()
        scale = kl_clip_scale(total((products.abs() * squares).sum()), kappa)
        if results:
            torch._foreach_mul_(results, scale.to(results[0].dtype))
    return scale, products.sum()


class TrustRegion:
    """State of the rule for the named layers; see the module.

    Attributes:
        scale: Of the loss; None before the first statistics.
        largest_lr: The largest learning rate so far, which the course of the rate is measured by.
        steps_taken: δ in units of −lr, by layer, where this rank has P.
        growth: α.
        descent: The average of ρ.
        squares: δᵀ(F + γI)δ by layer, float64 [layers].
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self.scale: LossScale | None = None
        self.largest_lr = 0.0
        self.steps_taken: dict[str, Tensor] = {}
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self.growth = zero + 1.0
        self.descent = zero
        self.squares = zero.new_zeros(len(self.names))

    def apply(
        self,
        indices: Sequence[int],
        results: list[Tensor],
        gradients: Sequence[Tensor],
        used: list[Tensor | None],
        rates: StepRates,
        *,
        is_linear: bool,
        total: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Scales `results`, (F + γc²I)⁻¹D of the layers at `indices`, to steps of the normalised loss.

        Args:
            indices: Layers that this rank has results of.
            results: Scaled in place.
            gradients: D of the same layers.
            used: The columns that a layer's result holds, None for all; those become all where the
                brake reaches columns without a gradient.
            rates: Of the coming step.
            is_linear: Whether the update is −lr (P + m times the last one); α stays 1 otherwise.
            total: The sum over ranks of a tensor to which each layer contributes on one rank, or
                nothing where every rank has all layers. Collective.

        Returns:
            (αν, Σ ⟨P_i, D_i⟩ of L), float64 scalars.
        """
        scale = self.scale or LossScale()
        names = [self.names[index] for index in indices]
        for name, columns in zip(names, used, strict=True):
            if columns is not None and name in self.steps_taken:
                # Columns are read and added to where each lies together in memory.
                self.steps_taken[name] = self.steps_taken[name].mT.contiguous().mT
        before = [self.steps_taken.get(name) for name in names]
        known = [place for place, step in enumerate(before) if step is not None]
        table = self.squares.new_zeros(2, len(self.names))
        if indices:
            table[0, list(indices)] = inner_products(results, gradients).to(table.device)
        if known:
            table[1, [indices[place] for place in known]] = inner_products(
                [_columns(before[place], used[place]) for place in known],
                [gradients[place] for place in known],
            ).to(table.device)
        table = total(table)
        raw, usable = table[0].sum(), torch.isfinite(table).all()
        table = torch.where(usable, table, 0.0)
        products, slopes = table[0] / scale.positions, table[1] / scale.loss
        self.largest_lr = max(self.largest_lr, *rates.lr)
        nu = bound(products, rates, self.largest_lr)
        cut = torch.zeros_like(nu)
        if is_linear:
            rho = self._grow(products, slopes, products.new_tensor(rates.lr))
            cut = ((rho - BRAKE) / (1.0 - BRAKE)).clamp(min=0.0)
        factor = torch.where(usable, nu * self.growth, 0.0)
        momentum = products.new_tensor(rates.momentum) * (1.0 - cut)
        grown = momentum * (momentum * self.squares + 2 * factor * slopes)
        self.squares = (grown + factor.square() * products.abs()).clamp(min=0.0)
        if results:
            torch._foreach_mul_(results, (factor * scale.gradient).to(results[0].dtype))
        if is_linear:
            for place, (name, index, step) in enumerate(zip(names, indices, before, strict=True)):
                # What is not finite must not stay in the sum.
                value, columns = results[place], used[place]
                taken = torch.where(usable, value, 0.0)
                if step is None:
                    self.steps_taken[name] = taken
                    continue
                step.mul_(rates.momentum[index])
                if columns is not None and not cut:  # on the CPU: nothing waits
                    step.mT.index_add_(0, columns, taken.mT)
                    continue
                back = step * cut.to(step.dtype)
                if columns is not None:
                    value, part = torch.zeros_like(step), value
                    value.mT.index_copy_(0, columns, part.mT)
                    taken = torch.where(usable, value, 0.0)
                    results[place], used[place] = value, None
                value.sub_(back)
                step.add_(taken).sub_(back)
        return factor, raw

    def apply_plain(self, gradients: list[Tensor], rates: StepRates) -> None:
        """Brings gradients of parameters without curvature to the normalised loss, in place, and bounds
        the whole step of each by `PLAIN`."""
        lr, momentum = max(rates.lr), max(rates.momentum)
        if not gradients or not lr:
            return
        torch._foreach_div_(gradients, (self.scale or LossScale()).loss)
        longest = PLAIN * (1.0 - momentum) / self.largest_lr
        scales = [(longest / norm).clamp(max=1.0) for norm in torch._foreach_norm(gradients)]
        torch._foreach_mul_(gradients, scales)

    def _grow(self, products: Tensor, slopes: Tensor, lr: Tensor) -> Tensor:
        """Moves α; returns ρ."""
        norm = (products.abs().sum() * (lr.square() * self.squares).sum()).sqrt()
        rho = -(lr * slopes).sum() / norm
        rho = torch.where(torch.isfinite(rho), rho, torch.zeros_like(rho)).clamp(-1.0, 1.0)
        r = self.descent = AVERAGING * self.descent + (1.0 - AVERAGING) * rho
        up = (GAIN * (-r - DESCENT).clamp(min=0.0)).exp()
        down = (GAIN * (OVERSHOOT - r).clamp(max=0.0)).exp()
        one = torch.ones_like(r)
        grown = self.growth * up * down
        back = torch.where(r > -PROGRESS, (RETURN * grown).clamp(min=1.0), grown)
        small = torch.where(r < 0.0, (grown / REGAIN).clamp(max=1.0), grown)
        self.growth = torch.where(grown > one, back, torch.where(up > one, grown, small)).clamp(
            SMALLEST, LARGEST
        )
        return rho

    # -- state ----------------------------------------------------------------------------------

    def saved(self) -> dict[str, Any]:
        """Everything but `steps_taken`, as plain numbers."""
        return {
            "scale": None if self.scale is None else asdict(self.scale),
            "largest_lr": self.largest_lr,
            **{name: float(getattr(self, name)) for name in _SCALARS},
            "squares": dict(zip(self.names, self.squares.tolist(), strict=True)),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continues from `saved()`; layers that it does not have start afresh."""
        self.scale = None if saved["scale"] is None else LossScale(**saved["scale"])
        self.largest_lr = float(saved["largest_lr"])
        for name in _SCALARS:
            setattr(self, name, self.squares.new_tensor(float(saved[name])))
        self.squares = self.squares.new_tensor([saved["squares"].get(n, 0.0) for n in self.names])


def _columns(matrix: Tensor | None, used: Tensor | None) -> Tensor:
    assert matrix is not None
    return matrix if used is None else matrix.mT.index_select(0, used).mT


_SCALARS = ("growth", "descent")
