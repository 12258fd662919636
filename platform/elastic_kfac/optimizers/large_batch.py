"""First-order rules for large batches: LARS, LAMB, gradient descent with a velocity, linear scaling.

torch and torchvision have none of them. State is per parameter and replicated: it names no world size
and fits the trainer's optimizer state by parameter name. No rule looks at a number on the host, so
that a step does not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from elastic_kfac.errors import ConfigError
from elastic_kfac.optimizers.schedules import Schedule
from elastic_kfac.optimizers.uncompiled import Uncompiled

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


def linear_scaling(
    batch_size: int, reference_batch_size: int, *, warmup_epochs: float = 5.0
) -> Schedule:
    """Factor B/B_ref of the reference rate, reached linearly from 1 (Goyal et al. 2017, section 2).

    Raises:
        ConfigError: If a batch size is not positive.
    """
    if batch_size < 1 or reference_batch_size < 1:
        raise ConfigError(
            "batch sizes must be positive", given=f"{batch_size} and {reference_batch_size}"
        )
    scale = batch_size / reference_batch_size

    def factor(epoch: float) -> float:
        if warmup_epochs <= 0 or epoch >= warmup_epochs:
            return scale
        return 1 + (scale - 1) * max(epoch, 0.0) / warmup_epochs

    return factor


class _Rule(Uncompiled):
    """A rule that updates each parameter on its own."""

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
        lr: The global rate.
        momentum: μ; the velocity contains the rate.
        weight_decay: wd.
        trust: η.
        eps: ε.

    Raises:
        ConfigError: If a value is out of range.
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
        _check(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust, eps=eps)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
            "eps": eps,
            "adapt": True,
        }
        super().__init__(params, defaults)

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

    Raises:
        ConfigError: If a value is out of range.
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
        _check(lr=lr, weight_decay=weight_decay, momentum=betas[0], eps=eps, trust=clip)
        _check(momentum=betas[1])
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "eps": eps,
            "clip": clip,
            "adapt": True,
        }
        super().__init__(params, defaults)

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
    """θ ← θ − lr·P + m·v with v = θ_t − θ_{t−1} (spec 3.3): the velocity contains the rate.

    Unlike in `torch.optim.SGD`, a rate that falls does not shrink the steps already on their way;
    the momentum of `polynomial.tied_momentum` is made for this form. Weight rescaling after a step is
    not part of the velocity.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        _check(lr=lr, weight_decay=weight_decay, momentum=momentum)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        step = gradient * group["lr"]
        parameter.sub_(_velocity(self.state[parameter], step, group["momentum"]))


def _velocity(state: dict[str, Any], step: Tensor, momentum: float) -> Tensor:
    """v ← μv + step, kept under torch's own name for such a buffer."""
    known = state.get("momentum_buffer")
    if known is None:
        state["momentum_buffer"] = step.clone()
    else:
        known.mul_(momentum).add_(step)
    buffer: Tensor = state["momentum_buffer"]
    return buffer


def _check(**values: float) -> None:
    for name, value in values.items():
        limit = 1.0 if name == "momentum" else float("inf")
        if not 0 <= value < limit:
            raise ConfigError(f"{name} out of range", given=value, allowed=f"0 to below {limit:g}")
