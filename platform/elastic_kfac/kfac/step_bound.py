"""How long a step may be: the fixed KL clip or the adaptive trust region, at work on one KFAC."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature.damping import mean_eigenvalue
from elastic_kfac.curvature.dtensors import is_sharded
from elastic_kfac.curvature.factors import on_device
from elastic_kfac.curvature.layer import Layer, LayerState
from elastic_kfac.curvature.scalars import Number, counted
from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.kfac.options import Rates, value_at
from elastic_kfac.kfac.statistics import Statistics, WarnOnce
from elastic_kfac.kfac.trust_region import (
    FLOOR,
    InputScale,
    LossScale,
    StepRates,
    TrustRegion,
    kl_clip,
)

TINY = 0.01
"""A scale below which lr is out of proportion."""
ENOUGH = 200
"""Steps before a share of them means something."""
RISE = 1.5
"""Mean square of output gradients over that of the first batch: probabilities that are right by chance
and certain have 2 (C − 1)/C of them where those of a network that knows nothing have (C − 1)/C."""
ADVICE = {
    "adaptive": "raise damping tenfold",
    "fixed": "lower lr and kl_clip and raise damping, tenfold each, or leave kl_clip out",
    "none": "set trust_region='adaptive', or lower lr and raise damping tenfold",
}

Total = Callable[[Tensor], Tensor]
"""The sum over ranks of a tensor to which each layer contributes on one rank. Collective."""


class StepBound:
    """The rule of `trust_region`, and what it did to the last step.

    Attributes:
        trust: State of the adaptive rule; None for the fixed one.
        scale: What it multiplied the last step by, a number: ν, or αν of the adaptive rule.
    """

    def __init__(self, options: KfacOptions, rates: Rates) -> None:
        self.options, self._rates = options, rates
        self.trust: TrustRegion | None = None
        self.scale: Number = 1.0
        self._product: Number | None = None
        self._shortened: Number = 0.0
        """Steps whose scale was below 1, of `_steps` since this object was built."""
        self._tiny: Number = 0.0
        """Those whose scale was below `TINY`."""
        self._steps = 0
        self._warnings = WarnOnce()
        self._output: int | None = None
        """The layer that is called last."""
        self._residual: list[float] = []
        """Mean square of the output gradients at the first look, at the last one, and for how many looks
        it has not come down."""

    def cover(self, layers: Sequence[Layer]) -> None:
        """Starts the rule afresh for these layers."""
        self._layers = layers
        self._known: tuple[tuple[int, ...], list[Layer], set[int]] | None = None
        self._squares: tuple[list[float], Tensor] | None = None
        self._output, self._residual = None, []
        if self.options.trust_region == "adaptive":
            kind = InputScale if self.options.method == "one_sided" else LossScale
            names, device = [layer.name for layer in layers], layers[0].device
            self.trust = TrustRegion(
                names, device, kind, self.options.momentum, self.options.trust_radius
            )

    def tikhonov(self, damping: float) -> float:
        """What is added to F: γq in the units of the loss, and the curvature of weight decay.

        Args:
            damping: γ, the coupled weight decay included.
        """
        trust, decay = self.trust, self.options.weight_decay
        if trust is None or trust.scale is None:
            return damping
        return (damping - decay) * trust.residual * trust.scale.fisher + decay * trust.scale.step

    def learn_scales(self, statistics: Statistics, states: list[LayerState], total: Total) -> None:
        """With the adaptive rule, takes the scale of the loss and, into `states`, that of each layer's
        output gradients from the first statistics, and the size of batches from all. Collective."""
        layers = self._layers
        if self._output is None:
            seen = [
                i
                for i, (_, rows) in enumerate(statistics.counts)
                if rows and "G" in layers[i].factor_names
            ]
            called = statistics.last_called
            self._output = called if called is not None else seen[-1] if seen else None
        if self.trust is None:
            return
        if self._output is not None:
            self.trust.rows = max(self.trust.rows, int(statistics.counts[self._output][1]))
        if self.options.method == "one_sided":
            if self.trust.scale is None:
                self.trust.scale = self._input_scale(statistics, total)
            return
        new = [i for i, (_, rows) in enumerate(statistics.counts) if rows and not states[i].floor]
        if not new:
            return
        means = torch.zeros(len(layers), dtype=torch.float64, device=layers[0].device)
        for i in new:
            name = layers[i].output_factor
            assert name is not None
            squares = statistics.sums[i].get(name)
            if squares is not None:
                divisor = statistics.normalizers(layers[i], i)[name]
                means[i] = mean_eigenvalue(squares).mean() / divisor
        known = total(means).tolist()
        for i in new:
            if 0 < known[i] < math.inf:
                states[i] = replace(states[i], floor=FLOOR * known[i])
        if self.trust.scale is None:
            outputs = [i for i in new if "G" in layers[i].factor_names]
            last = outputs[-1:] if statistics.last_called is None else [statistics.last_called]
            for i in last:
                shape, (samples, rows) = layers[i].factor_shapes["G"], statistics.counts[i]
                square = known[i] * math.prod(shape[:-1] or shape)
                if 0 < square < math.inf and samples:
                    self.trust.scale = LossScale(math.sqrt(square), rows / samples)

    def follow_residual(self, states: Sequence[LayerState], total: Total) -> None:
        """With the adaptive rule, has the damping follow the output gradients. Call after each update.
        Collective."""
        output = self._output
        if self.trust is None or output is None or self.options.ema_init == "identity":
            return
        square, floor = self.trust.squares.new_zeros(1), states[output].floor
        held = states[output].factors.get("G")
        if held is not None and floor:
            square += mean_eigenvalue(held).mean() * (FLOOR / floor)
        self.trust.follow(total(square))

    def _input_scale(self, statistics: Statistics, total: Total) -> InputScale | None:
        """c from gradients and inputs: `c² = ‖D‖² / tr A`, the mean over the layers, is the square of an
        output gradient that all samples share."""
        device = self._layers[0].device
        squares = torch.zeros(len(self._layers), dtype=torch.float64, device=device)
        for i, layer in enumerate(self._layers):
            inputs = statistics.sums[i].get("A")
            if inputs is not None and layer.has_gradient():
                diagonal = inputs if inputs.dim() == 1 else inputs.diagonal(dim1=-2, dim2=-1)
                trace = diagonal.sum() / statistics.normalizers(layer, i)["A"]
                squares[i] = layer.gradient().square().sum() / trace
        known = [x for x in total(squares).tolist() if 0 < x < math.inf]
        return InputScale(math.sqrt(sum(known) / len(known))) if known else None

    def needs_all_columns(self, layer: Layer) -> bool:
        """Whether the first step of a layer must hold all columns: the adaptive rule sums up steps. With
        momentum before the preconditioner every step does."""
        if self.trust is None:
            return False
        is_first = self._rates.are_linear and layer.name not in self.trust.steps_taken
        return bool(self.trust.momentum) or is_first

    def averaged(self, active: Sequence[int], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """What is to be preconditioned: D, or its average with momentum before the preconditioner."""
        return gradients if self.trust is None else self.trust.averaged(active, gradients)

    def apply(
        self,
        active: Sequence[int],
        results: list[Tensor],
        gradients: Sequence[Tensor],
        used: list[Tensor | None],
        parameters: Iterable[nn.Parameter],
        *,
        step: int,
        total: Total,
    ) -> None:
        """Scales P in place, and with the adaptive rule the gradients of other parameters. Collective.

        Args:
            active: Layers that this rank has P of.
            results: P.
            gradients: D of the same layers.
            used: See `TrustRegion.apply`.
            parameters: All of the model.
            step: The number of the coming step.
            total: See `Total`.
        """
        layers, covered = self._active(active)
        if self.trust is not None:
            rates = StepRates(
                self._rates.of_layers(self._layers, step), self._rates.momenta(self._layers)
            )
            if self.options.momentum and any(rates.momentum):
                raise ConfigError(
                    "momentum before and behind the preconditioner",
                    given=f"momentum={self.options.momentum:g} of KFAC, "
                    f"{max(rates.momentum):g} of the optimizer",
                    change="set the optimizer's momentum (or first beta) to 0, or leave out KFAC's",
                )
            self.scale, self._product = self.trust.apply(
                active,
                results,
                gradients,
                used,
                rates,
                is_linear=self._rates.are_linear,
                total=total,
            )
            plain = [p.grad for p in parameters if id(p) not in covered]
            for kind in (True, False):  # no operation takes both
                grads = [g for g in plain if g is not None and is_sharded(g) is kind]
                self.trust.apply_plain(grads, rates)
        else:
            is_fixed = self.options.trust_region == "fixed"
            kappa = value_at(self.options, "kl_clip", step) if is_fixed else None
            lr = self._rates.of_layers(layers, step) if is_fixed else []
            squared_lr = self._squared(lr)
            self.scale, self._product = kl_clip(results, gradients, squared_lr, kappa, total)
        self._shortened = self._shortened + counted(self.scale < 1.0)
        self._tiny = self._tiny + counted(self.scale < TINY)
        self._steps += 1

    def _squared(self, lr: list[float]) -> Tensor:
        """Squares of learning rates on the device, kept while these stay."""
        if self._squares is None or self._squares[0] != lr:
            self._squares = lr, on_device(lr, self._layers[0].device).square()
        return self._squares[1]

    def _active(self, indices: Sequence[int]) -> tuple[list[Layer], set[int]]:
        """These layers and the identities of their parameters, kept for the next step."""
        key = tuple(indices)
        if self._known is None or self._known[0] != key:
            layers = [self._layers[i] for i in key]
            self._known = key, layers, {id(p) for layer in layers for p in layer.parameters}
        return self._known[1:]

    def look(self, states: Sequence[LayerState], due: Collection[int]) -> None:
        """Warns once of settings that cannot be right; waits for the device, so call it where that is
        due anyway.

        Args:
            states: Of all layers.
            due: Layers that were decomposed.
        """
        if self.options.trust_region == "fixed" and self._steps >= ENOUGH:
            share, tiny = float(self._shortened) / self._steps, float(self._tiny) / self._steps
            self._warnings.once(
                "clip",
                share >= 0.95,
                f"the KL clip shortened {share:.0%} of {self._steps} steps"
                + (", most of them more than 100 times" if tiny > 0.5 else "")
                + ", so that lr has no effect: lower lr tenfold, raise kl_clip or damping tenfold, or "
                "leave kl_clip out (trust_region='adaptive')",
            )
        output = self._output
        held = None if output is None or output not in due else states[output].factors.get("G")
        if held is None or self.options.ema_init == "identity":
            return
        value = float(mean_eigenvalue(held).mean())
        first, last, count = self._residual or (value, math.inf, 0)
        grown = value > RISE * first and (value >= last or count == 0)
        self._residual = [first, value, count + 1 if grown else 0]
        self._warnings.once(
            "rise",
            self._residual[2] >= 3,
            f"the loss seems to be above its start: its gradient at the output is "
            f"{math.sqrt(max(value, 0.0) / first) if first else math.inf:.2g} times as large as in the "
            f"first batch; {ADVICE[self.options.trust_region]}",
        )

    @property
    def shortened_share(self) -> float:
        """The share of steps that were shortened."""
        return float(self._shortened) / max(1, self._steps)

    def predicted_change(self, lr: float | None, step: int, total: Total) -> float:
        """See `KFAC.predicted_change`."""
        if self._product is None:
            raise UsageError("predicted_change() needs a step() first")
        if lr is None:
            if self.trust is not None and self._rates.are_linear:
                return self.trust.predicted_change()
            lr = self._rates.of_layers(self._layers[:1], step)[0]
        size = lr * float(self.scale)
        if self.trust is None:
            product = float(total(torch.as_tensor(self._product)))
        else:  # its steps are those of the normalised loss
            product = float(self._product) * (self.trust.scale or self.trust.kind()).step
        return product * (0.5 * size * size - size)
