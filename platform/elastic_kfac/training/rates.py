"""Learning rate and momentum of each step: schedule, batch and momentum rule together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from elastic_kfac.config import Config
from elastic_kfac.optimizers.schedules import tied_momentum
from elastic_kfac.training.first_order import schedule_of


@dataclass(frozen=True)
class Rates:
    """What is in force in one step."""

    lr: float
    momentum: float


class RateControl:
    """The rates at a position of the run; its state is the rate of the step before."""

    def __init__(self, config: Config) -> None:
        self._config = config.optimizer
        self._schedule = schedule_of(config)
        self._previous_lr = 0.0

    def at(self, epoch: float, batch_factor: float) -> Rates:
        """The rates at a fractional epoch, where the batch calls for `batch_factor`."""
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
        """Hands the rates of a step to the optimizer; the step may still fail."""
        tied = self._config.momentum_rule != "constant"
        for group in optimizer.param_groups:
            group["lr"] = rates.lr
            if tied:
                group["momentum"] = rates.momentum

    def took(self, rates: Rates) -> None:
        """The step with these rates is done."""
        self._previous_lr = rates.lr

    def state_dict(self) -> dict[str, float]:
        """World-size-free."""
        return {"previous_lr": self._previous_lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`; an empty one starts afresh."""
        self._previous_lr = float(state.get("previous_lr", 0.0))
