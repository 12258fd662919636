"""From local gradients to changed weights: the parts of that way which know the present world."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config, steps_apart
from elastic_kfac.optimizers.weight_rescaling import WeightRescaling
from elastic_kfac.training.callbacks import Point
from elastic_kfac.training.preconditioner import make_preconditioner
from elastic_kfac.training.sync.exchange import Exchange, Totals
from elastic_kfac.training.sync.gradient_reduction import make_reduction
from elastic_kfac.training.sync.reproducible import ReproducibleExchange

if TYPE_CHECKING:
    from elastic_kfac.kfac.statistics import Statistics


class GradientPath:
    """Reduction, preconditioner and update of one world; built anew for the next one.

    Either gradients are summed, preconditioned by K-FAC (if enabled) and applied by the first-order
    optimizer, or Osawa's pipeline does all of it between the halves of its own reduction.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        communicator: Communicator,
        announce: Callable[[Point], None] = lambda point: None,
    ) -> None:
        """`announce` is told right before statistics or decompositions are exchanged."""
        self._communicator = communicator
        self._optimizer = optimizer
        self._announce = announce
        self._stays_local = steps_apart(config)
        self.kfac = make_preconditioner(model, optimizer, config, communicator)
        if self.kfac is not None:
            self.kfac.on_phase = announce
        rule = config.optimizer.rescale_weights
        self._rescaling = None if rule == "none" else WeightRescaling(model, rule)
        self._reduction = make_reduction(config.communication, communicator, config.train.seed)

    def reduce(self, exchange: Exchange, local: Totals, step: int) -> Totals:
        """Sums what the ranks have to tell each other before the update."""
        if self._stays_local or (self.kfac is not None and self.kfac.sums_gradients):
            # Its gradients travel inside its own step, to their owners only; or not at all.
            return exchange.reduce(self._communicator, local, reduce_gradients=lambda flat: None)
        if self._reduction is not None:
            reduction = self._reduction
            return exchange.reduce(
                self._communicator, local, reduce_gradients=lambda flat: reduction(flat, step)
            )
        if isinstance(exchange, ReproducibleExchange) and exchange.carries_statistics():
            self._announce("factor_exchange")
        return exchange.reduce(self._communicator, local)

    def update(
        self,
        *,
        num_samples: int,
        loss_scale_per_sample: float,
        statistics: Statistics | None = None,
    ) -> None:
        """Turns published gradients into changed weights.

        `statistics` are K-FAC's where they were reduced together with the gradients.
        """
        if self.kfac is not None:
            self.kfac.step(num_samples, loss_scale_per_sample, statistics=statistics)
        if self.kfac is None or not self.kfac.updates_weights:
            self._optimizer.step()
        if self._rescaling is not None:
            self._rescaling.apply()

    def discard_statistics(self) -> None:
        """Forgets what the passes of this step added, because an overflow is in it."""
        if self.kfac is not None:
            self.kfac.skip_step()

    def columns(self) -> dict[str, float]:
        """What a metric row says about the curvature of a step."""
        return {} if self.kfac is None else self.kfac.metrics()

    def plan_summary(self) -> str | None:
        """Who decomposes and preconditions what, in one line; None without a plan."""
        if self.kfac is None:
            return None
        plan = self.kfac.plan
        return (
            f"{plan.strategy}, {len(plan.columns)} columns over {plan.world_size} ranks, "
            f"grad_worker_frac {plan.grad_worker_frac:.4g}, {len(plan.layers)} layers, "
            f"{plan.sha256[:12]}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The world-size-free state of each part that there is. Collective."""
        parts: dict[str, Any] = {}
        if self.kfac is not None:
            parts["kfac"] = self.kfac.state_dict()
        if self._reduction is not None:
            parts["compression"] = self._reduction.state_dict()
        return parts

    def load_state_dict(self, parts: Mapping[str, Any]) -> None:
        """Continues from saved parts; a part that was not saved starts afresh."""
        for name, owner in (
            ("kfac", self.kfac),
            ("compression", self._reduction),
        ):
            saved = parts.get(name)
            if owner is not None and saved is not None:
                owner.load_state_dict(saved)

    def close(self) -> None:
        """Removes hooks and lets go of every reference to the world's groups."""
        if self.kfac is not None:
            self.kfac.close()
        self.kfac = self._reduction = None
        self._communicator = Communicator.solo()


PARTS = ("kfac", "compression")
"""Names of the parts that `GradientPath.state_dict` may hold."""
