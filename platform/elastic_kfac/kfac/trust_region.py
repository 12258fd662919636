"""The adaptive trust region: a bound on the whole step, momentum included, that moves with the descent.

With c the root mean square of a sample's loss gradient at the last layer's output, taken from the first
batch, everything here is about the normalised loss L/c: its gradient is D/c, its Fisher F/c², and nothing
depends on the units of the loss. P = (F/c² + γI)⁻¹ D/c.

    damping  γ is multiplied by q, the root mean square of a sample's gradient at the last layer's output,
             averaged as the factors are, over that of the first batch. F of the training loss falls with
             the square of the residuals: a γ that does not ends up far above it, and the last of them are
             learned by plain gradients. q is the next power of two above, between 2⁻¹⁰ and 1, so that γ
             seldom changes, and known one update later, so that no host waits for it.
    floor    εg I is added to each layer's factor of output gradients, g its mean eigenvalue in the first
             batch. F of the training loss vanishes as samples are fitted; a metric that does allows any
             step, and the next sample that is wrong takes it.
    bound    ν = min(1, sqrt(κ) (1 − m) lr_t/lr_max / sqrt(Σ lr_i² ⟨P_i, D_i⟩)): momentum m adds up to
             1/(1 − m) steps, and together they are at most sqrt(κ) long in the metric of F + γI. The part
             of P that is noise falls with the number N of samples (of positions, where a sample has
             many) in a batch, and a step can be as much longer: κ is N times `PER_ROW`, within limits.
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
    warm-up  That sum is multiplied by the rate of the coming step. Where the rate has risen, momentum is
             therefore cut, in the same way, to m lr_{t−1}/lr_t: what is carried on is the step as it was
             taken. Otherwise steps that were as long as the bound become longer than it.

With momentum before the preconditioner, P = (F/c² + γI)⁻¹ M/c for M ← m M + (1 − m) D, the optimizer has
none of its own: a step is the whole step, so that the bound has no factor 1 − m, and the brake cuts M. ρ
is about D, not about M, which is along the last steps by its making: as P is linear in M,
‖D‖² = (⟨P, D⟩ − m ⟨P', D⟩) / (1 − m), with P' of the step before, up to what F has changed since.

‖δ‖ needs no factors: δ is a sum of steps x with (F + γI) x proportional to gradients that were seen, so
s = δᵀ(F + γI)δ follows s ← (λm)² s + 2 λm αν ⟨δ, D⟩ + (αν)² ⟨P, D⟩, with δ in units of −lr. Numbers are
device scalars, equal on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from elastic_kfac.curvature import factors
from elastic_kfac.curvature.preconditioning import inner_products, kl_clip_scale
from elastic_kfac.curvature.scalars import (
    Number,
    cast,
    divided,
    exponential,
    numbers,
    or_zero,
    root,
    where,
    within,
)
from elastic_kfac.kfac.statistics import Arriving

PER_ROW = 1e-5
"""κ, squared length of the whole step in the Fisher metric of the normalised loss while α = 1, for each
row of a batch at the output."""
LEAST, MOST = 1e-3, 1e-2
"""Range of κ."""
AVERAGING = 0.9
"""Weight of the old value in the average of ρ."""
GAIN = 0.5
"""log α changes by this times how far the average is beyond `BEYOND`."""
BEYOND = 0.2
"""Average −ρ from which on α grows, and average ρ from which on it shrinks."""
PROGRESS = 0.1
"""Average −ρ below which an α above 1 returns to 1."""
RETURN = 0.95
"""What α is multiplied by then."""
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
LEAST_RESIDUAL = 2.0**-10
"""Of q."""
_SMALLEST_SCALE = 2.0**-20
"""Of a `LastStep`, before its matrix is brought to scale 1."""


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

    @property
    def step(self) -> float:
        """P is this times smaller than that of the normalised loss."""
        return self.gradient

    @property
    def product(self) -> float:
        """⟨P, D⟩ is this times larger than that of the normalised loss."""
        return self.positions


@dataclass(frozen=True)
class InputScale(LossScale):
    """Where F is the A of inputs alone, which knows nothing of the loss."""

    @property
    def fisher(self) -> float:
        return 1.0

    @property
    def step(self) -> float:
        return 1.0 / self.loss

    @property
    def product(self) -> float:
        return self.loss**2


@dataclass(frozen=True)
class StepRates:
    """Of the coming step."""

    lr: Sequence[float]
    """By layer."""
    momentum: Sequence[float]
    """By layer."""


class LastStep:
    """δ of a layer in units of −lr.

    Where few columns have a gradient, a step costs no more than they do: momentum moves a scale alone,
    and without momentum δ is a part of the columns.
    """

    def __init__(self, matrix: Tensor, scale: float = 1.0) -> None:
        self._matrix = matrix
        self.scale = scale
        """δ is this times `matrix`."""
        self._part: tuple[Tensor, Tensor] | None = None
        """The columns that are other than zero, and which they are; None: they are in `_matrix`."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> LastStep:
        """From `tensors()`."""
        scale = tensors.get("scale")
        return cls(tensors[""], 1.0 if scale is None else float(scale))

    @property
    def matrix(self) -> Tensor:
        """All columns, which may be changed in place."""
        if self._part is not None:
            values, columns = self._part
            self._matrix, self._part = self._by_columns().zero_(), None
            self._matrix.mT.index_copy_(0, columns, values.mT)
        return self._matrix

    def _by_columns(self) -> Tensor:
        # Columns are read and added to where each lies together in memory.
        return self._matrix.mT.contiguous().mT

    def tensors(self) -> dict[str, Tensor]:
        """All of it."""
        scale = (
            {} if self.scale == 1.0 else {"scale": torch.tensor(self.scale, dtype=torch.float64)}
        )
        return {"": self.matrix, **scale}

    def beside(self, gradient: Tensor, used: Tensor | None) -> tuple[Tensor, Tensor]:
        """Columns of the matrix and of a gradient that has those of `used`, None for all; where the
        matrix is zero, both may be left out."""
        if used is None:
            return self.matrix, gradient
        if self._part is None:
            self._matrix = self._by_columns()
            return self._matrix.mT.index_select(0, used).mT, gradient
        values, columns = self._part
        if not len(columns):
            return values, gradient[:, :0]
        # Both ascend: where each of `used` is, or would be, among the columns.
        at = torch.searchsorted(columns, used).clamp_(max=len(columns) - 1)
        common = (columns.index_select(0, at) == used).nonzero().squeeze(1)
        mine = values.mT.index_select(0, at.index_select(0, common))
        return mine.mT, gradient.mT.index_select(0, common).mT

    def decay(self, momentum: float) -> None:
        """Multiplies δ by `momentum`, in the matrix."""
        matrix = self.matrix
        if self.scale * momentum != 1.0:
            matrix.mul_(self.scale * momentum)
        self.scale = 1.0

    def move(self, momentum: float, values: Tensor | None, columns: Tensor) -> None:
        """Multiplies δ by `momentum` and adds `values` to some columns; None adds nothing."""
        if not momentum:
            self.scale = 1.0
            if values is None:
                self.matrix.zero_()
            else:
                self._part = values, columns
            return
        self._matrix = self.matrix
        self.scale *= momentum
        if abs(self.scale) < _SMALLEST_SCALE:
            self.decay(1.0)
        if values is not None:
            values = values if self.scale == 1.0 else values / self.scale
            self._matrix.mT.index_add_(0, columns, values.mT)


def kl_clip(
    results: list[Tensor],
    gradients: Sequence[Tensor],
    squared_lr: Tensor,
    kappa: float | None,
    total: Callable[[Tensor], Tensor],
) -> tuple[Number, Tensor]:
    """The fixed rule (Ba et al. 2017): scales P of each layer, `results`, in place by one ν.

    Args:
        results: P.
        gradients: D of the same layers.
        squared_lr: The squares of their learning rates, float64 [layers], on the device of the numbers.
        kappa: κ; None for no bound.
        total: See `TrustRegion.apply`.

    Returns:
        (ν, a number, and Σ ⟨P_i, D_i⟩ over these layers, float64).
    """
    products = inner_products(results, gradients).to(squared_lr.device)
    scale: Number = 1.0
    if kappa is not None:
        (divergence,) = numbers(total((products.abs() * squared_lr).sum()).view(1))
        scale = kl_clip_scale(divergence, kappa)
        if results:
            torch._foreach_mul_(results, cast(scale, results[0].dtype))
    return scale, products.sum()


class TrustRegion:
    """State of the rule for the named layers; see the module.

    Attributes:
        scale: Of the loss; None before the first statistics.
        rows: Of the largest batch so far, positions counted, at the layer that is called last.
        residual: q, what γ is multiplied by.
        largest_lr: The largest learning rate so far, which the course of the rate is measured by.
        last_lr: The largest learning rate of the last step; None before the first.
        steps_taken: δ by layer, where this rank has P.
        averages: M by layer in the same places, with momentum before the preconditioner.
        carried: Weight of M before the last step in this one's, over the αν of that step, a number.
        growth: α, a number.
        descent: The average of ρ, a number.
        squares: δᵀ(F + γI)δ by layer, float64 [layers].
    """

    def __init__(
        self,
        names: Sequence[str],
        device: torch.device,
        kind: type[LossScale] = LossScale,
        momentum: float = 0.0,
        radius: float = 1.0,
    ) -> None:
        self.names, self.kind = tuple(names), kind
        self.radius = radius
        """Factor on sqrt(κ)."""
        self.momentum = momentum
        """m before the preconditioner."""
        self.averages: dict[str, Tensor] = {}
        self.scale: LossScale | None = None
        self.rows = 0
        self.residual = 1.0
        self._next_residual = _on_host(1.0)
        """The mean square after the last update, over that of the first batch."""
        self.largest_lr = 0.0
        self.last_lr: float | None = None
        self.steps_taken: dict[str, LastStep] = {}
        self.squares = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.growth, self.descent, self.carried = self._numbers(1.0, 0.0, 0.0)
        self._rates: StepRates | None = None
        self._sent: tuple[Tensor, ...] = ()
        """`_rates` on the device, and what follows from them."""
        self._scales: tuple[LossScale | None, Tensor] = None, self.squares
        """`scale` on the device."""
        self._places: tuple[tuple[int, ...], Tensor] = (), self.squares
        self._slopes = self._lr = self.squares
        """⟨D, δ⟩ of the last step in units of −lr, and the rates, by layer."""

    @property
    def kappa(self) -> float:
        """κ for batches of this size."""
        return self.radius**2 * min(max(PER_ROW * self.rows, LEAST), MOST)

    def follow(self, square: Tensor) -> None:
        """Takes q from the update before, and the mean square after this one, over that of the first
        batch, float64 `[1]`, for the next."""
        self.residual = _power_above(self._next_residual.read()[0])
        self._next_residual = Arriving(square)

    def _numbers(self, *values: float) -> list[Number]:
        return numbers(self.squares.new_tensor(values))

    def averaged(self, indices: Sequence[int], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """What is preconditioned of the layers at `indices`: M, moved by their D, or D itself without
        momentum here. A D that is not finite does not move M."""
        if not self.momentum:
            return gradients
        for index, gradient in zip(indices, gradients, strict=True):
            last = self.averages.get(self.names[index])
            old = torch.zeros_like(gradient) if last is None else last
            new = gradient if last is None else torch.lerp(gradient, last, self.momentum)
            is_finite = gradient.abs().amax() < math.inf
            self.averages[self.names[index]] = torch.where(is_finite, new, old)
        return [self.averages[self.names[index]] for index in indices]

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
    ) -> tuple[Number, Number]:
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
            (αν, Σ ⟨P_i, D_i⟩ of L), numbers (see scalars.py).
        """
        scale = self.scale or self.kind()
        names = [self.names[index] for index in indices]
        before = [self.steps_taken.get(name) for name in names]
        averages = [self.averages[name] for name in names] if self.momentum else None
        table = total(self._table(indices, results, gradients, before, used, averages))
        raw, largest = numbers(torch.stack((table[0].sum(), table.abs().amax())))
        usable = largest < math.inf
        if not isinstance(usable, bool):
            table = torch.where(usable, table, 0.0)
        elif not usable:
            table = torch.zeros_like(table)
        products, slopes, *news = (table / self._divisors(scale)).unbind()
        products = products.abs()
        self.largest_lr = max(self.largest_lr, *rates.lr)
        lr, momentum, squared_lr, squared_whole = self._on_device(rates)
        sums = (products * squared_whole, products, squared_lr * self.squares, lr * slopes)
        whole, product, square, slope = numbers(torch.stack([part.sum() for part in sums]))
        relative = max(rates.lr) / self.largest_lr if self.largest_lr else 1.0
        nu = kl_clip_scale(whole, self.kappa * relative**2)
        cut: Number = 0.0
        if is_linear:
            if averages is not None:
                (product,) = numbers((news[0] - slopes * self.carried).sum().clamp(min=0).view(1))
                product = product / (1.0 - self.momentum)
            rho = self._grow(product * square, slope)
            cut = within((rho - BRAKE) / (1.0 - BRAKE), 0.0, 1.0)
            carried_over = self._carried_over(rates)
            if averages is None and carried_over < 1.0:
                cut = 1.0 - (1.0 - cut) * carried_over
        self.last_lr = max(rates.lr)
        factor = where(usable, nu * self.growth, 0.0)
        if averages is not None:
            kept = self.momentum * (1.0 - cut)
            self.carried = where(factor > 0.0, divided(kept, factor), 0.0)
            if averages and (isinstance(cut, Tensor) or cut):
                torch._foreach_mul_(averages, cast(1.0 - cut, averages[0].dtype))
            cut = 0.0
        if isinstance(cut, Tensor) or cut:
            momentum = momentum * (1.0 - cut)
        step = factor * (news[0] if news else products)
        grown = momentum * (momentum * self.squares + slopes * (2 * factor))
        self.squares = (grown + products * (factor * factor)).clamp(min=0.0)
        self._slopes, self._lr = momentum * slopes + step, lr
        if results:
            torch._foreach_mul_(results, cast(factor * scale.step, results[0].dtype))
        if is_linear:
            momenta = [rates.momentum[index] for index in indices]
            self._follow(names, results, used, momenta, usable, cut)
        return factor, raw

    def _carried_over(self, rates: StepRates) -> float:
        """The part of the optimizer's momentum that a rising rate leaves."""
        lr, last = max(rates.lr), self.last_lr
        if last is None or last >= lr or not any(rates.momentum):
            return 1.0
        return last / lr

    def _follow(
        self,
        names: Sequence[str],
        results: list[Tensor],
        used: list[Tensor | None],
        momenta: Sequence[float],
        usable: bool | Tensor,
        cut: Number,
    ) -> None:
        """Moves δ by what the optimizer will do with `results`, and takes `cut` of its momentum out of
        them; where nothing is usable, they do not count."""
        on_host = not isinstance(usable, Tensor)
        brakes, is_lost = not on_host or bool(cut), on_host and not usable
        whole: list[int] = []
        for place, name in enumerate(names):
            value, columns, step = results[place], used[place], self.steps_taken.get(name)
            if step is None:
                # What is not finite must not stay in the sum.
                self.steps_taken[name] = LastStep(_kept(value, usable).clone())
            elif columns is not None and not brakes:
                step.move(momenta[place], None if is_lost else value, columns)
            else:
                step.decay(1.0)
                if columns is not None:
                    results[place] = torch.zeros_like(step.matrix)
                    results[place].mT.index_copy_(0, columns, value.mT)
                    used[place] = None
                whole.append(place)
        if not whole:
            return
        steps = [self.steps_taken[names[place]].matrix for place in whole]
        torch._foreach_mul_(steps, [momenta[place] for place in whole])
        values = [results[place] for place in whole]
        taken = values if on_host else [_kept(value, usable) for value in values]
        if brakes:
            back = [step * cast(cut, step.dtype) for step in steps]
            taken = [value.clone() for value in values] if on_host else taken
            torch._foreach_sub_(values, back)
            torch._foreach_sub_(steps, back)
        if not is_lost:
            torch._foreach_add_(steps, taken)

    def _table(
        self,
        indices: Sequence[int],
        results: Sequence[Tensor],
        gradients: Sequence[Tensor],
        before: Sequence[LastStep | None],
        used: Sequence[Tensor | None],
        averages: Sequence[Tensor] | None,
    ) -> Tensor:
        """⟨P, D⟩ and ⟨δ, D⟩ of the layers at `indices`, 0 for others, float64 [2, layers]; with M of the
        same layers ⟨P, M⟩, ⟨δ, D⟩ and ⟨P, D⟩."""
        rows = 2 if averages is None else 3
        if not indices:
            return self.squares.new_zeros(rows, len(self.names))
        lasts, theirs = [], []
        for step, gradient, columns in zip(before, gradients, used, strict=True):
            none = gradient[:0]
            last, its = (none, none) if step is None else step.beside(gradient, columns)
            lasts.append(last)
            theirs.append(its)
        left, right = [*results, *lasts], [*(averages or gradients), *theirs]
        if averages is not None:
            left, right = [*left, *results], [*right, *gradients]
        part = inner_products(left, right).view(rows, -1)
        for place, step in enumerate(before):
            if step is not None and step.scale != 1.0:
                part[1, place] *= step.scale
        part = part.to(self.squares.device)
        if len(indices) == len(self.names):
            return part
        table = self.squares.new_zeros(rows, len(self.names))
        if self._places[0] != tuple(indices):
            self._places = (
                tuple(indices),
                factors.on_device(list(indices), table.device, torch.int64),
            )
        return table.index_copy_(1, self._places[1], part)

    def predicted_change(self) -> float:
        """Of L by the step just applied, momentum included: ∇Lᵀδ + ½ c δᵀ(F/c² + γI)δ, where the update
        is linear."""
        change = (0.5 * self._lr.square() * self.squares - self._lr * self._slopes).sum()
        return (self.scale or self.kind()).loss * float(change)

    def apply_plain(self, gradients: list[Tensor], rates: StepRates) -> None:
        """Brings gradients of parameters without curvature to the normalised loss, in place, and bounds
        the whole step of each by `PLAIN`."""
        if not gradients:
            return
        torch._foreach_div_(gradients, (self.scale or self.kind()).loss)
        if not self.largest_lr:  # no step yet; a warm-up begins
            return
        longest = PLAIN * (1.0 - max(rates.momentum)) / self.largest_lr
        scales = [(longest / norm).clamp(max=1.0) for norm in torch._foreach_norm(gradients)]
        torch._foreach_mul_(gradients, scales)

    def _grow(self, square: Number, slope: Number) -> Number:
        """Moves α; returns ρ.

        Args:
            square: ‖D‖² ‖δ‖².
            slope: −⟨D, δ⟩.
        """
        rho = within(or_zero(divided(-slope, root(square))), -1.0, 1.0)
        r = self.descent = AVERAGING * self.descent + (1.0 - AVERAGING) * rho
        beyond = where(r > BEYOND, r - BEYOND, where(r < -BEYOND, r + BEYOND, 0.0))
        grown = self.growth * exponential(-GAIN * beyond)
        back = where(r > -PROGRESS, within(RETURN * grown, 1.0, math.inf), grown)
        regains = (r < 0.0) & (r >= -BEYOND)
        small = where(regains, within(grown / REGAIN, -math.inf, 1.0), grown)
        self.growth = within(where(grown > 1.0, back, small), SMALLEST, LARGEST)
        return rho

    def _divisors(self, scale: LossScale) -> Tensor:
        """What brings the rows of `_table` to the normalised loss, float64 [rows, 1]."""
        if self._scales[0] != scale:
            divisors = [[scale.product], [scale.loss], *[[scale.product]] * bool(self.momentum)]
            self._scales = scale, factors.on_device(divisors, self.squares.device)
        return self._scales[1]

    def _on_device(self, rates: StepRates) -> tuple[Tensor, ...]:
        """Learning rate, momentum, lr² and (lr / (1 − m))² of the layers, float64 [layers]."""
        if rates != self._rates:
            whole = [lr / (1.0 - m) for lr, m in zip(rates.lr, rates.momentum, strict=True)]
            sent = factors.on_device([rates.lr, rates.momentum, whole], self.squares.device)
            self._rates, self._sent = rates, (sent[0], sent[1], sent[0].square(), sent[2].square())
        return self._sent

    # -- state ----------------------------------------------------------------------------------

    def held(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of the layers that this rank has P of."""
        held = {name: step.tensors() for name, step in self.steps_taken.items()}
        for name, value in self.averages.items():
            held.setdefault(name, {})["average"] = value
        return held

    def take(self, held: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replaces what `held` returned."""
        self.steps_taken = {name: LastStep.of(t) for name, t in held.items() if "" in t}
        self.averages = {name: t["average"] for name, t in held.items() if "average" in t}

    def saved(self) -> dict[str, Any]:
        """Everything but `steps_taken` and `averages`, as plain numbers."""
        return {
            **({"carried": float(self.carried)} if self.momentum else {}),
            "scale": None if self.scale is None else asdict(self.scale),
            "rows": self.rows,
            "residuals": [self.residual, *self._next_residual.read()],
            "largest_lr": self.largest_lr,
            "last_lr": self.last_lr,
            **{name: float(getattr(self, name)) for name in _SCALARS},
            "squares": dict(zip(self.names, self.squares.tolist(), strict=True)),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continues from `saved()`; layers that it does not have start afresh."""
        self.scale = None if saved["scale"] is None else self.kind(**saved["scale"])
        self.rows = int(saved.get("rows", 0))  # not in states of earlier versions
        self.residual, coming = saved.get("residuals", (1.0, 1.0))
        self._next_residual = _on_host(coming)
        self.largest_lr = float(saved["largest_lr"])
        self.last_lr = saved.get("last_lr")
        for name in _SCALARS:
            setattr(self, name, self._numbers(float(saved[name]))[0])
        (self.carried,) = self._numbers(float(saved.get("carried", 0.0)))
        self.squares = self.squares.new_tensor([saved["squares"].get(n, 0.0) for n in self.names])


_SCALARS = ("growth", "descent")


def _on_host(value: float) -> Arriving:
    return Arriving(torch.tensor([value], dtype=torch.float64, device="cpu"))


def _power_above(square: float) -> float:
    """q for a relative mean square."""
    if not 0.0 < square < math.inf:
        return 1.0
    return min(max(2.0 ** math.ceil(0.5 * math.log2(square)), LEAST_RESIDUAL), 1.0)


def _kept(value: Tensor, usable: bool | Tensor) -> Tensor:
    """A tensor where it is usable, else zeros; perhaps itself."""
    if isinstance(usable, Tensor):
        return torch.where(usable, value, 0.0)
    return value if usable else torch.zeros_like(value)
