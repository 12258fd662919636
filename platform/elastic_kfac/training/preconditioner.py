"""Builds the preconditioner that a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config

if TYPE_CHECKING:
    from elastic_kfac.kfac.kfac import KFAC
    from elastic_kfac.kfac.sharded_kfac import ShardedKFAC


class Preconditioner(NamedTuple):
    """At most one of the two is set."""

    kfac: KFAC | None = None
    sharded: ShardedKFAC | None = None


def make_preconditioner(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    communicator: Communicator,
) -> Preconditioner:
    """The preconditioner of `config.optimizer.name` and `config.kfac`. Collective."""
    if config.optimizer.name == "sharded_kfac":
        return Preconditioner(sharded=_make_sharded(model, config, communicator))
    if config.kfac.enabled:
        return Preconditioner(kfac=_make_kfac(model, optimizer, config, communicator))
    return Preconditioner()


def _make_kfac(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    communicator: Communicator,
) -> KFAC:
    from elastic_kfac.kfac.calibration import shared_costs
    from elastic_kfac.kfac.kfac import KFAC

    options = config.kfac.model_dump(exclude={"enabled"})
    budget = config.plan.memory_budget_gib
    costs = None
    if config.plan.calibrate:
        device = next(model.parameters()).device
        costs = shared_costs(communicator, config.kfac.method, device=device)
    return KFAC(
        model,
        lr=optimizer,
        process_group=communicator,
        costs=costs,
        memory_budget_bytes=None if budget is None else budget * 2**30,
        **options,
    )


def _make_sharded(model: nn.Module, config: Config, communicator: Communicator) -> ShardedKFAC:
    from elastic_kfac.kfac.sharded_kfac import ShardedKFAC

    kfac, sharded = config.kfac, config.sharded
    weights = sharded.gather == "weights"
    return ShardedKFAC(
        model,
        lr=config.optimizer.lr,
        momentum=config.optimizer.momentum,
        damping=kfac.damping,
        factor_decay=kfac.factor_decay,
        factor_update_steps=kfac.factor_update_steps,
        method=kfac.method,
        inverse_damping=kfac.inverse_damping,
        bn_fisher=kfac.bn_fisher,
        bn_damping_multiplier=kfac.bn_damping_multiplier,
        kl_clip=kfac.kl_clip,
        skip_layers=kfac.skip_layers,
        weight_decay=config.optimizer.weight_decay if weights else 0.0,
        process_group=communicator,
        **sharded.model_dump(),
    )
