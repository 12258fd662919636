"""The first-order optimizer of a configuration, with its learning rate and momentum at each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from elastic_kfac.config import Config, OptimizerConfig
from elastic_kfac.optimizers.large_batch import LAMB, LARS, VelocitySGD
from elastic_kfac.optimizers.schedules import Schedule, make_schedule, tied_momentum
from elastic_kfac.optimizers.uncompiled import SGD, Adam, AdamW

RATE_IN_MOMENTUM = ("lars", "velocity_sgd")
"""Optimizers that keep lr·gradient in their momentum, so that no other one can continue from it."""

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Returns (parameters with weight decay, normalisation and bias parameters without it)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            is_plain = isinstance(module, _NORMS) or name.endswith("bias")
            (plain if is_plain else decayed).append(parameter)
    return decayed, plain


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Builds the optimizer; by default without weight decay on normalisation layers and biases."""
    decayed, plain = decay_groups(model)
    plain_decay = config.weight_decay if config.decay_norm_and_bias else 0.0
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, config.weight_decay), (plain, plain_decay))
        if parameters
    ]
    # foreach kernels group parameters by device and type; the plain loop has one fixed order.
    foreach = None if any(p.is_cuda for p in model.parameters()) else False
    lr, momentum = config.lr, config.momentum
    if config.name == "lars":
        return LARS(groups, lr=lr, momentum=momentum, trust=config.trust)
    if config.name == "lamb":
        return LAMB(groups, lr=lr, betas=(momentum, 0.999))
    if config.name == "velocity_sgd":
        return VelocitySGD(groups, lr=lr, momentum=momentum)
    if config.name in ("adam", "adamw"):
        kind = Adam if config.name == "adam" else AdamW
        return kind(groups, lr=lr, betas=(momentum, 0.999), foreach=foreach)
    return SGD(groups, lr=lr, momentum=momentum, nesterov=config.nesterov, foreach=foreach)


def schedule_of(config: Config) -> Schedule:
    """The learning-rate schedule over fractional epochs.

    With a batch policy, which uses the decay epochs to grow the batch, `step` is constant.
    """
    optimizer = config.optimizer
    name = optimizer.lr_schedule
    if name == "step" and config.batch.policy != "constant":
        name = "constant"
    return make_schedule(
        name,
        total_epochs=config.train.epochs,
        warmup_epochs=optimizer.warmup_epochs,
        decay_epochs=optimizer.decay_epochs,
        decay_factor=optimizer.decay_factor,
        end_fraction=optimizer.end_lr_fraction,
        start_epoch=optimizer.decay_start_epoch,
        end_epoch=optimizer.decay_end_epoch,
        power=optimizer.decay_power,
    )


@dataclass(frozen=True)
class Rates:
    """Learning rate and momentum of one step."""

    lr: float
    momentum: float


class RateControl:
    """Combines schedule, batch and momentum rule; its state is the rate of the previous step."""

    def __init__(self, config: Config) -> None:
        self._config = config.optimizer
        self._schedule = schedule_of(config)
        self._previous_lr = 0.0

    def at(self, epoch: float, batch_factor: float) -> Rates:
        """The rates at a fractional epoch; `batch_factor` scales the rate with the batch."""
        base = self._config
        lr = base.lr * self._schedule(epoch) * batch_factor
        if base.momentum_rule == "constant":
            return Rates(lr, base.momentum)
        momentum = tied_momentum(
            base.momentum_rule,
            base.momentum,
            lr=lr,
            base_lr=base.lr,
            previous_lr=self._previous_lr,
        )
        return Rates(lr, momentum)

    def apply(self, optimizer: torch.optim.Optimizer, rates: Rates) -> None:
        """Sets the rates in the optimizer before a step, which may still fail."""
        tied = self._config.momentum_rule != "constant"
        for group in optimizer.param_groups:
            group["lr"] = rates.lr
            if tied:
                group["momentum"] = rates.momentum

    def took(self, rates: Rates) -> None:
        """Call after a step with these rates."""
        self._previous_lr = rates.lr

    def state_dict(self) -> dict[str, float]:
        """Independent of the world size."""
        return {"previous_lr": self._previous_lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict()`; an empty `state` means no previous step."""
        self._previous_lr = float(state.get("previous_lr", 0.0))
