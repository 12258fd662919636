"""Builds the preconditioner that a configuration asks for, and renews what it is planned from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.config.elastic import PlanConfig

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


def calibrate(
    kfac: KFAC, config: PlanConfig, communicator: Communicator, device: torch.device
) -> None:
    """Gives K-FAC the costs of rank 0, and measures the links anew with `plan.calibrate`, and speeds with
    `plan.unequal_shares`. Collective."""
    from elastic_kfac.kfac.calibration import shared_calibration, with_links

    if config.unequal_shares:
        # Other ranks are at other speeds, and rank 0 may be on another kind of host.
        method = kfac.options.method
        kfac.calibration = shared_calibration(communicator, method, device=device, speeds=True)
        return
    known = communicator.broadcast_object(kfac.calibration, 0, tag="plan/calibration")
    if known is not None:
        # Those of slow ranks, in the world before.
        known = replace(known, speeds=())
    if config.calibrate and known is not None:
        known = with_links(known, communicator, device=device)
    kfac.calibration = known
