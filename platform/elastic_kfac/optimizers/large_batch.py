"""Rules for large batches that torch lacks: LARS, LAMB, descent with a velocity, rescaled weights.

State is per parameter, replicated and independent of the world size. No rule reads a number on the host,
so a step never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from elastic_kfac.errors import ConfigError
from elastic_kfac.optimizers.uncompiled import Uncompiled

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]
Rule = Literal["shrink", "always"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Rule(Uncompiled):
    """A rule that updates each parameter independently.

    Raises:
        ConfigError: If a default is out of range.
    """

    def __init__(self, params: Parameters, **defaults: Any) -> None:
        for key, value in defaults.items():
            name = {"betas": "momentum", "clip": "trust"}.get(key, key)
            limit = 1.0 if name == "momentum" else float("inf")
            for number in value if isinstance(value, tuple) else (value,):
                if not 0 <= number < limit:
                    raise ConfigError(
                        f"{name} out of range", given=number, allowed=f"0 to below {limit:g}"
                    )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; `closure` re-evaluates the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError


class LARS(_Rule):
    """Layer-wise adaptive rates (You, Gitman and Ginsburg 2017).

    q = η‖w‖ / (‖D‖ + wd‖w‖ + ε); v ← μv + lr·q·(D + wd·w); w ← w − v. q is 1 for parameters of one
    dimension (normalisation and biases), in groups with `adapt` false, and where a norm is 0.

    Args:
        params: Parameters or groups; a group may set every value below and `adapt`.
        momentum: μ; the velocity contains the rate.
        weight_decay: wd.
        trust: η.
        eps: ε.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        trust: float = 1e-3,
        eps: float = 1e-9,
    ) -> None:
        rates = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, **rates, trust=trust, eps=eps, adapt=True)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        decay = group["weight_decay"]
        direction = gradient.add(parameter, alpha=decay) if decay else gradient
        step = direction * group["lr"]
        if group["adapt"] and parameter.dim() > 1:
            weight_norm = torch.linalg.vector_norm(parameter)
            gradient_norm = torch.linalg.vector_norm(gradient)
            quotient = weight_norm / (gradient_norm + decay * weight_norm + group["eps"])
            usable = (weight_norm > 0) & (gradient_norm > 0)
            step = step * torch.where(usable, group["trust"] * quotient, 1.0)
        if group["momentum"]:
            step = _velocity(self.state[parameter], step, group["momentum"])
        parameter.sub_(step)


class LAMB(_Rule):
    """Layer-wise adaptive moments (You et al. 2020, algorithm 2).

    m, v as Adam, bias-corrected; r = m̂/(√v̂ + ε) + wd·w; w ← w − lr·φ(‖w‖)/‖r‖·r with φ the identity
    clipped to [0, `clip`]. The ratio is 1 where either norm is 0 and in groups with `adapt` false.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        *,
        eps: float = 1e-6,
        clip: float = 10.0,
    ) -> None:
        rates = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, **rates, eps=eps, clip=clip, adapt=True)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(first).add_(gradient, alpha=1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        direction = (mean / (1 - first ** state["step"])).div_(root)
        if group["weight_decay"]:
            direction.add_(parameter, alpha=group["weight_decay"])
        step = direction * group["lr"]
        if group["adapt"]:
            weight_norm = torch.linalg.vector_norm(parameter)
            norm = torch.linalg.vector_norm(direction)
            usable = (weight_norm > 0) & (norm > 0)
            step = step * torch.where(usable, weight_norm.clamp(max=group["clip"]) / norm, 1.0)
        parameter.sub_(step)


class VelocitySGD(_Rule):
    """θ ← θ − lr·P + m·v with v = θ_t − θ_{t−1}: the velocity contains the rate (Osawa et al. 2019).

    Unlike in `torch.optim.SGD`, a falling rate does not shrink earlier steps in the velocity; use it with
    `schedules.tied_momentum`. Weight rescaling after a step is not part of the velocity.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        step = gradient * group["lr"]
        parameter.sub_(_velocity(self.state[parameter], step, group["momentum"]))


class WeightRescaling:
    """W ← W·√(2·d_out) / (‖W‖_F + 1e-9) after an update, for every convolution and linear layer: the
    replacement for weight decay in the large-batch K-FAC recipe (Osawa et al. 2019).

    The output of a layer followed by normalisation does not depend on the scale of its weight, but its
    effective rate falls as the weight grows. Normalisation layers and biases are left alone; a shared
    weight is rescaled once.

    Args:
        rule: `shrink` rescales only where that makes the weight smaller, as the released code does;
            `always` as the paper writes.

    Raises:
        ConfigError: If the rule is unknown.
    """

    def __init__(self, model: nn.Module, rule: Rule = "shrink") -> None:
        if rule not in ("shrink", "always"):
            raise ConfigError("unknown weight rescaling", given=rule, allowed="shrink, always")
        self.rule = rule
        layers = [module for module in model.modules() if isinstance(module, _LAYERS)]
        self._weights = list(dict.fromkeys(layer.weight for layer in layers))

    @torch.no_grad()
    def apply(self) -> None:
        """Rescales every weight; call after `optimizer.step()`."""
        if not self._weights:
            return
        norms = torch._foreach_norm(self._weights)
        scales: list[Tensor] = []
        for weight, norm in zip(self._weights, norms, strict=True):
            scale = math.sqrt(2 * weight.shape[0]) / (norm + 1e-9)
            scales.append(scale.clamp(max=1.0) if self.rule == "shrink" else scale)
        torch._foreach_mul_(self._weights, scales)


def _velocity(state: dict[str, Any], step: Tensor, momentum: float) -> Tensor:
    """v ← μv + step, stored under torch's name for the buffer."""
    known = state.get("momentum_buffer")
    if known is None:
        state["momentum_buffer"] = step.clone()
    else:
        known.mul_(momentum).add_(step)
    buffer: Tensor = state["momentum_buffer"]
    return buffer
