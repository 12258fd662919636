"""The first-order optimizer of a configuration, and its learning rate at a position of the run."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from elastic_kfac.config import Config, OptimizerConfig
from elastic_kfac.optimizers.large_batch import LAMB, LARS, VelocitySGD
from elastic_kfac.optimizers.schedules import Schedule, make_schedule
from elastic_kfac.optimizers.uncompiled import SGD, Adam, AdamW

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(parameters with weight decay, normalisation and bias parameters without it)."""
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
    """The rule of a name; by default no weight decay on normalisation layers and biases."""
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
    """The learning-rate schedule over fractional epochs; a batch policy has the decay epochs itself."""
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
