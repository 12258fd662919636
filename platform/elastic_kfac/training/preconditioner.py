"""Builds the preconditioner that a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config

if TYPE_CHECKING:
    from elastic_kfac.kfac.kfac import KFAC


def make_preconditioner(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    communicator: Communicator,
) -> KFAC | None:
    """The K-FAC of the sections `kfac` and `sharded`; None where it is off. Collective."""
    sharded = config.optimizer.name == "sharded_kfac"
    if not config.kfac.enabled and not sharded:
        return None
    from elastic_kfac.kfac.calibration import shared_calibration
    from elastic_kfac.kfac.kfac import KFAC

    budget = config.plan.memory_budget_gib
    calibration = None
    if config.plan.calibrate:
        device = next(model.parameters()).device
        calibration = shared_calibration(
            communicator, config.kfac.method, device=device, speeds=config.plan.unequal_shares
        )
    changes: dict[str, Any] = {"memory_budget_bytes": None if budget is None else budget * 2**30}
    if sharded:
        # Owners decompose whatever was refreshed.
        changes["inverse_update_steps"] = config.kfac.factor_update_steps
        if config.sharded.gather == "weights":
            changes["weight_decay"] = config.kfac.weight_decay + config.optimizer.weight_decay
    return KFAC(
        model,
        config.kfac,
        lr=optimizer,
        sharding=config.sharded if sharded else None,
        tree=config.elastic.reproducible,
        process_group=communicator,
        calibration=calibration,
        **changes,
    )
