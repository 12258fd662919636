"""Predicted time, traffic and memory of a step at any number of ranks, and what the planner suggests.

Passes over samples and decompositions are measured on this machine, the network is given, and everything
else follows from shapes (`placement.simulator`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.v_collectives import cheapest_method
from elastic_kfac.kfac.calibration import measure_costs
from elastic_kfac.kfac.options import value_at
from elastic_kfac.placement.costs import Method, factor_elements
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.planner import moved_elements
from elastic_kfac.placement.simulator import (
    Calibration,
    Choice,
    Line,
    Workload,
    choose_plan,
    cross_over,
    device_bytes,
    fit_line,
    predict_step,
)
from elastic_kfac.placement.traffic import traffic_per_step
from elastic_kfac.runs.feasibility import Sized
from elastic_kfac.training.first_order import make_optimizer
from elastic_kfac.training.preconditioner import make_preconditioner

_BATCHES = (4, 16)
"""Sizes at which passes are measured."""


@dataclass(frozen=True)
class Passes:
    """Costs of a pass over x samples on this machine."""

    forward_backward: Line
    """Seconds."""
    statistics: Line
    """Additional seconds of the factor statistics."""
    activations: Line
    """Bytes saved for the backward pass."""


def measure_passes(sized: Sized, batches: Sequence[int] = _BATCHES) -> Passes:
    """Runs passes of two sizes with and without K-FAC's hooks."""
    config, model = sized.config, sized.model
    plain = [_pass_seconds(sized, n, lambda: None) for n in batches]
    # On one rank alone the state may not fit the budget of many.
    changes = {
        "kfac": config.kfac.model_copy(update={"enabled": True}),
        "plan": config.plan.model_copy(update={"memory_budget_gib": None}),
    }
    enabled = config.model_copy(update=changes)
    optimizer = make_optimizer(model, config.optimizer)
    kfac = make_preconditioner(model, optimizer, enabled, Communicator.solo())
    assert kfac is not None
    with_statistics = [_pass_seconds(sized, n, kfac.skip_step) for n in batches]
    kfac.close()
    more = [max(0.0, a - b) for a, b in zip(with_statistics, plain, strict=True)]
    activations = [_activation_bytes(sized, n) for n in batches]
    return Passes(fit_line(batches, plain), fit_line(batches, more), fit_line(batches, activations))


def measure_calibration(method: Method, network: Line, ranks_per_node: int = 1) -> Calibration:
    """Measured decompositions and products of this machine on a given network."""
    matrix = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    seconds = _least_seconds(lambda: matrix @ matrix, lambda: None)
    return Calibration(
        costs=measure_costs(method),
        seconds_per_flop=seconds / (2 * 256**3),
        network=network,
        ranks_per_node=ranks_per_node,
    )


def workload_of(sized: Sized, passes: Passes) -> Workload:
    """The workload of a configuration with replicated or grid-distributed K-FAC."""
    config, kfac = sized.config, sized.config.kfac
    moments = 2 if config.optimizer.name in ("adam", "adamw", "lamb") else 1
    buffers = sum(buffer.nbytes for buffer in sized.model.buffers())
    return Workload(
        layers=sized.layers,
        parameter_elements=sized.parameter_elements,
        forward_backward=passes.forward_backward,
        factor_statistics=passes.statistics,
        activation_bytes=passes.activations,
        base_bytes=(2 + moments) * 4.0 * sized.parameter_elements + buffers,
        factor_update_steps=int(value_at(kfac, "factor_update_steps", 0)),
        inverse_update_steps=int(value_at(kfac, "inverse_update_steps", 0)),
        method=kfac.method,
        precompute=kfac.precompute,
        colocate=kfac.colocate,
    )


class Outlook:
    """Predictions for one configuration; measures when it is made.

    Args:
        network: Seconds of a message of x bytes between ranks.
        memory_budget_bytes: Device memory per rank that suggestions must fit.
    """

    def __init__(
        self, sized: Sized, network: Line, *, memory_budget_bytes: float = math.inf
    ) -> None:
        self._sized = sized
        self._network = network
        self._budget = memory_budget_bytes
        self._calibration = measure_calibration(sized.config.kfac.method, network)
        self._is_sharded = sized.config.optimizer.name == "sharded_kfac"
        if not self._is_sharded:
            self._workload = workload_of(sized, measure_passes(sized))

    def at(self, world_size: int) -> dict[str, Any]:
        """The plan of the configuration and the planner's suggestion, as JSON.

        Raises:
            ConfigError: If nothing fits the memory budget.
        """
        plan = self._sized.plan(world_size)
        row: dict[str, Any] = {
            "world_size": world_size,
            "grad_worker_frac": plan.grad_worker_frac,
            "strategy": plan.strategy,
            "plan": plan.to_dict(),
        }
        if self._is_sharded:
            return {**row, "suggested": {"sharded.v_method": self._v_method(plan)}}
        train = self._sized.config.train
        share = -(-train.global_batch_size // world_size)
        micro = min(train.micro_batch_size or share, share)
        step = predict_step(
            self._workload,
            self._calibration,
            plan,
            global_batch_size=train.global_batch_size,
            micro_batch_size=micro,
        )
        memory = device_bytes(self._workload, plan, micro)
        row["micro_batch_size"] = micro
        row["predicted"] = self._costs(plan, step.total, memory)
        choice = choose_plan(
            self._workload,
            self._calibration,
            world_size,
            global_batch_size=train.global_batch_size,
            memory_budget_bytes=self._budget,
        )
        row["suggested"] = self._suggestion(choice)
        return row

    def resize(self, before: int, after: int) -> dict[str, Any]:
        """What a resize changes and moves if ranks keep their numbers, as JSON."""
        previous = self._sized.plan(before)
        plan = self._sized.plan(after, previous)
        return {
            "from": before,
            "to": after,
            "moved_bytes": 4 * moved_elements(previous, plan, self._sized.layers),
            "changes": previous.diff(plan).splitlines(),
        }

    def cross_over(self) -> dict[str, int | None]:
        """N* and N** of the model on this network; empty for the sharded pipeline."""
        if self._is_sharded:
            return {}
        found = cross_over(self._workload, self._calibration)
        return {"divide_from": found.divide_from, "flat_from": found.flat_from}

    def _suggestion(self, choice: Choice) -> dict[str, Any]:
        return {
            "grad_worker_frac": choice.plan.grad_worker_frac,
            "micro_batch_size": choice.micro_batch_size,
            "inverse_update_steps": choice.suggested_inverse_update_steps,
            **self._costs(choice.plan, choice.step_time.total, choice.memory_bytes),
        }

    def _costs(self, plan: Plan, seconds: float, memory_bytes: float) -> dict[str, float]:
        work = self._workload
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
        return {
            "step_s": seconds,
            "received_bytes": float(traffic.total) * work.element_bytes,
            "memory_bytes": memory_bytes,
        }

    def _v_method(self, plan: Plan) -> str:
        sizes = [0] * plan.world_size
        for layer in self._sized.layers:
            owner = plan.placement(layer.name).a_worker
            sizes[owner] += layer.weight_elements + factor_elements([layer], packed=True)
        return cheapest_method(
            sizes,
            element_bytes=4,
            latency_s=self._network.fixed,
            seconds_per_byte=self._network.slope,
        )


def _images(sized: Sized, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, *sized.image_shape, generator=generator)


def _pass_seconds(sized: Sized, size: int, after: Callable[[], object]) -> float:
    images = _images(sized, size)
    return _least_seconds(lambda: sized.model(images).logsumexp(1).mean().backward(), after)


def _activation_bytes(sized: Sized, size: int) -> float:
    """Bytes of the tensors that autograd saves in a pass, parameters excluded."""
    parameters = {parameter.data_ptr() for parameter in sized.model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = sized.model(_images(sized, size))
    del output
    return float(sum(saved.values()))


def _least_seconds(
    action: Callable[[], object], after: Callable[[], object], repeats: int = 3
) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
        after()
    return min(times[1:])
