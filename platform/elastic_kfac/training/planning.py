"""The plan during a run: what it is made from, and when it is made anew.

Decompositions are timed while they run. Where they leave the prediction by more than `plan.margin`, the
costs are corrected by the ratio and `kfac.grad_worker_frac: auto` is decided again: a placement changes
who computes what and never what is computed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.config.elastic import PlanConfig
from elastic_kfac.kfac.calibration import with_links
from elastic_kfac.kfac.kfac import KFAC
from elastic_kfac.kfac.options import value_at
from elastic_kfac.kfac.shapes import layer_shape
from elastic_kfac.placement.costs import CostModel
from elastic_kfac.placement.devices import stored_calibration
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.planner import rank_loads

_UPDATES = 10
"""Decompositions of every layer between two reviews."""


def calibrate(
    kfac: KFAC, config: PlanConfig, communicator: Communicator, device: torch.device
) -> None:
    """Gives K-FAC the costs of rank 0, and measures the links anew with `plan.calibrate`. Collective."""
    known = communicator.broadcast_object(kfac.calibration, 0, tag="plan/calibration")
    if config.calibrate and known is not None:
        known = with_links(known, communicator, device=device)
    kfac.calibration = known


class PlanReview:
    """Compares measured with predicted decompositions at every `_UPDATES`-th of them."""

    def __init__(self, margin: float) -> None:
        self._margin = margin
        self._plan: Plan | None = None
        self._begin: tuple[int, float] | None = None
        """Step and seconds of decompositions when this plan's timing began."""

    @classmethod
    def of(cls, config: Config) -> PlanReview | None:
        """None where the plan is fixed between resizes."""
        is_open = config.kfac.enabled and config.kfac.grad_worker_frac == "auto"
        if not is_open or config.plan.margin is None or config.optimizer.name == "sharded_kfac":
            return None
        return cls(config.plan.margin)

    def replan(self, kfac: KFAC, step: int) -> dict[str, Any] | None:
        """The change as fields of an event, where there is one. Collective when a review is due."""
        interval = int(value_at(kfac.options, "inverse_update_steps", kfac.steps))
        now = (step, kfac.seconds["decompositions"])
        communicator = kfac.communicator
        if self._plan is not kfac.plan:
            self._plan, self._begin = kfac.plan, None
        if kfac.plan.world_size == 1:
            return None
        if self._begin is None:
            # The first decompositions of a process warm up.
            self._begin = now if kfac.seconds["decompositions"] and step % interval == 0 else None
            return None
        if step - self._begin[0] < _UPDATES * interval:
            return None
        updates = (step - self._begin[0]) / interval
        own, self._begin = (now[1] - self._begin[1]) / updates, now
        seconds = max(communicator.all_gather_object(own, tag="plan/review"))
        known = kfac.calibration
        if known is None:
            known = stored_calibration(kfac.options.method, kfac.layers[0].device.type)
        shapes = [layer_shape(layer) for layer in kfac.layers]
        predicted = max(rank_loads(kfac.plan, shapes, known.costs))
        if predicted <= 0 or 1 / (1 + self._margin) <= seconds / predicted <= 1 + self._margin:
            return None
        ratio = seconds / predicted
        costs = CostModel(known.costs.c0 * ratio, known.costs.c1 * ratio, known.costs.p)
        kfac.calibration = replace(known, costs=costs)
        before = kfac.plan
        report = kfac.resize(communicator)
        text = (
            f"decompositions took {seconds * 1e3:.3g} ms, predicted were {predicted * 1e3:.3g} ms"
        )
        return {
            "reason": f"{text}; {report.plan.reason}",
            "changes": before.diff(report.plan).splitlines(),
            "moved_bytes": report.moved_bytes,
            "way": "resize",
        }
