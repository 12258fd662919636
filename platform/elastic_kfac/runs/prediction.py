"""Predicted time, traffic and memory of a step at any number of ranks, and what the planner suggests."""

from __future__ import annotations

import math
from typing import Any

from elastic_kfac.communication.v_collectives import cheapest_method
from elastic_kfac.placement.choice import choose_plan, cross_over
from elastic_kfac.placement.costs import factor_elements
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.planner import moved_elements
from elastic_kfac.placement.simulator import device_bytes, predict_step
from elastic_kfac.placement.traffic import traffic_per_step
from elastic_kfac.runs.feasibility import Sized
from elastic_kfac.runs.profile import Profile


class Outlook:
    """Predictions for one configuration.

    Args:
        profile: What its steps cost.
        memory_budget_bytes: Device memory per rank that suggestions must fit.
    """

    def __init__(
        self, sized: Sized, profile: Profile, *, memory_budget_bytes: float = math.inf
    ) -> None:
        self._sized, self._profile = sized, profile
        self._workload = profile.workload_of(sized.config)
        self._calibration = profile.calibration
        self._budget = memory_budget_bytes
        self._is_sharded = sized.config.optimizer.name == "sharded_kfac"

    def plan(self, world_size: int, previous: Plan | None = None) -> Plan:
        """The plan that a calibrated run of the configuration would make."""
        return self._sized.plan(world_size, previous, self._calibration)

    def at(self, world_size: int) -> dict[str, Any]:
        """The plan of the configuration and the planner's suggestion, as JSON.

        Raises:
            ConfigError: If nothing fits the memory budget.
        """
        plan = self.plan(world_size)
        row: dict[str, Any] = {
            "world_size": world_size,
            "grad_worker_frac": plan.grad_worker_frac,
            "strategy": plan.strategy,
            "reason": plan.reason,
            "plan": plan.to_dict(),
        }
        train = self._sized.config.train
        share = -(-train.global_batch_size // world_size)
        micro = min(train.micro_batch_size or share, share)
        row["micro_batch_size"] = micro
        row["predicted"] = self._costs(plan, micro)
        if self._is_sharded:
            return {**row, "suggested": {"sharded.v_method": self._v_method(plan)}}
        choice = choose_plan(
            self._workload,
            self._calibration,
            world_size,
            global_batch_size=train.global_batch_size,
            memory_budget_bytes=self._budget,
        )
        row["suggested"] = {
            "grad_worker_frac": choice.plan.grad_worker_frac,
            "micro_batch_size": choice.micro_batch_size,
            "inverse_update_steps": choice.suggested_inverse_update_steps,
            **self._costs(choice.plan, choice.micro_batch_size),
        }
        return row

    def resize(self, before: int, after: int) -> dict[str, Any]:
        """What a resize changes and moves if ranks keep their numbers, as JSON."""
        previous = self.plan(before)
        plan = self.plan(after, previous)
        return {
            "from": before,
            "to": after,
            "moved_bytes": 4 * moved_elements(previous, plan, self._sized.layers),
            "reason": plan.reason,
            "changes": previous.diff(plan),
        }

    def cross_over(self) -> dict[str, int | None]:
        """N* and N** of the model on this network; empty for the sharded pipeline."""
        if self._is_sharded:
            return {}
        found = cross_over(self._workload, self._calibration)
        return {"divide_from": found.divide_from, "flat_from": found.flat_from}

    def _costs(self, plan: Plan, micro_batch_size: int) -> dict[str, Any]:
        work, batch = self._workload, self._sized.config.train.global_batch_size
        share = -(-batch // plan.world_size)
        step = predict_step(
            work,
            self._calibration,
            plan,
            global_batch_size=batch,
            micro_batch_size=micro_batch_size,
        )
        traffic = traffic_per_step(
            plan,
            work.layers,
            factor_update_steps=work.factor_update_steps,
            inverse_update_steps=work.inverse_update_steps,
            parameter_elements=work.parameter_elements,
            method=work.method,
            precompute=work.precompute,
            symmetric=self._sized.config.kfac.symmetry_aware,
        )
        received = {
            "gradients": traffic.gradients,
            "factors": traffic.factors,
            "second_order": traffic.second_order,
            "preconditioned_gradients": traffic.preconditioned_gradients,
        }
        return {
            "step_s": step.total,
            "phases_s": step.parts,
            "received_bytes": float(traffic.total) * work.element_bytes,
            "received_bytes_by_purpose": {
                name: float(value) * work.element_bytes for name, value in received.items()
            },
            "memory_bytes": device_bytes(
                work, plan, micro_batch_size, accumulates=micro_batch_size < share
            ),
        }

    def _v_method(self, plan: Plan) -> str:
        sizes = [0] * plan.world_size
        for layer in self._sized.layers:
            owner = plan.placement(layer.name).a_worker
            sizes[owner] += layer.weight_elements + factor_elements([layer], packed=True)
        network = self._calibration.network
        return cheapest_method(
            sizes, element_bytes=4, latency_s=network.fixed, seconds_per_byte=network.slope
        )
