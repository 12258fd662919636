"""Predicted seconds and bytes of a training step, and the choices that follow from them.

    T = T_fb(n) accum + T_fac(n) accum / t_f + max_r Σ_owned (c0 + c1 d^p) / t_i
        + max_r T_precondition + Σ collectives (alpha steps + beta bytes) + T_hess / t_h

Everything is a pure function of measurements, so all ranks with the same calibration, and a laptop
planning for 1024 ranks, compute the same result. `choose_plan` finds the number of columns and the
micro-batch with the least time at a fixed global batch under a memory budget. `cross_over` finds the
number of ranks from which dividing the decompositions pays, and the one beyond which it no longer helps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.placement.costs import (
    CostModel,
    LayerShape,
    Method,
    precondition_flops,
    second_order_elements,
)
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.planner import make_plan, rank_loads
from elastic_kfac.placement.traffic import memory_elements, traffic_per_step

_ALL_COLUMNS_UP_TO = 64


@dataclass(frozen=True)
class Line:
    """A measured straight line: `fixed` + `slope` x."""

    fixed: float
    slope: float

    def at(self, x: float) -> float:
        """Its value."""
        return self.fixed + self.slope * x


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Least squares with neither coefficient below zero (a latency and a cost per unit)."""
    if len(x) != len(y) or len(set(x)) < 2:
        raise UsageError("a line needs measurements at two different points", given=list(x))
    slope, fixed = (float(value) for value in np.polyfit(x, y, 1))
    if slope < 0:
        return Line(float(np.mean(y)), 0.0)
    if fixed < 0:
        xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        return Line(0.0, float(xs @ ys / (xs @ xs)))
    return Line(fixed, slope)


@dataclass(frozen=True)
class Calibration:
    """Measured costs of a kind of host and its network."""

    costs: CostModel
    """Seconds per decomposition."""
    seconds_per_flop: float
    """Time per floating-point operation of the products that precondition a gradient."""
    network: Line
    """Seconds of a message of x bytes between nodes (alpha + beta x)."""
    inside_node: Line | None = None
    """The same inside a node; `network` if None."""
    ranks_per_node: int = 1

    def all_reduce_seconds(self, world_size: int, size: float) -> float:
        """Ring inside a node, Rabenseifner between nodes."""
        nodes, inside = self._nodes(world_size)
        local = self.inside_node or self.network
        seconds = _exchange(local, 2 * (inside - 1), 2 * (inside - 1) / inside * size)
        rounds = 2 * math.ceil(math.log2(nodes)) if nodes > 1 else 0
        return seconds + _exchange(self.network, rounds, 2 * (nodes - 1) / nodes * size / inside)

    def broadcast_seconds(self, group_size: int, size: float) -> float:
        """A tree over the network: one latency per level, every byte once."""
        if group_size <= 1:
            return 0.0
        return _exchange(self.network, math.ceil(math.log2(group_size)), size)

    def _nodes(self, world_size: int) -> tuple[int, int]:
        inside = min(self.ranks_per_node, world_size)
        return -(-world_size // inside), inside


def _exchange(line: Line, rounds: float, size: float) -> float:
    return line.fixed * rounds + line.slope * size


@dataclass(frozen=True)
class Workload:
    """The properties of a model and its training options that time and memory depend on."""

    layers: tuple[LayerShape, ...]
    parameter_elements: int
    forward_backward: Line
    """Seconds of one pass over x samples."""
    factor_statistics: Line
    """Seconds to add the factor statistics of x samples."""
    activation_bytes: Line
    """Device memory of a pass over x samples, measured at two sizes."""
    base_bytes: float = 0.0
    """Parameters, gradients, optimizer state and buffers."""
    factor_update_steps: int = 1
    inverse_update_steps: int = 10
    method: Method = "eigen"
    precompute: bool = True
    colocate: bool = True
    element_bytes: int = 4
    hessian_seconds: float = 0.0
    """Seconds of one Hessian analysis."""
    hessian_steps: int = 1
    """Steps between two of them."""


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of the average step, by phase."""

    forward_backward: float
    factor_statistics: float
    decompositions: float
    precondition: float
    gradient_all_reduce: float
    factor_all_reduce: float
    second_order_broadcast: float
    preconditioned_broadcast: float
    hessian: float

    @property
    def total(self) -> float:
        """Seconds per step."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


def predict_step(
    workload: Workload,
    calibration: Calibration,
    plan: Plan,
    *,
    global_batch_size: int,
    micro_batch_size: int,
) -> StepTime:
    """Seconds of the average step under a plan; the slowest rank determines each phase."""
    n = plan.world_size
    share = -(-global_batch_size // n)
    passes = -(-share // micro_batch_size)
    samples = min(micro_batch_size, share)
    layers, size = workload.layers, workload.element_bytes
    traffic = traffic_per_step(
        plan,
        layers,
        factor_update_steps=workload.factor_update_steps,
        inverse_update_steps=workload.inverse_update_steps,
        parameter_elements=workload.parameter_elements,
        method=workload.method,
        precompute=workload.precompute,
    )
    flops = [0.0] * len(plan.columns)
    for layer in layers:
        flops[plan.placement(layer.name).column] += precondition_flops(
            layer, method=workload.method
        )
    workers = max(len(column) for column in plan.columns)
    receivers = -(-n // workers)
    both_ways = (n - 1) / n * 2 if n > 1 else 1.0
    return StepTime(
        forward_backward=passes * workload.forward_backward.at(samples),
        factor_statistics=passes
        * workload.factor_statistics.at(samples)
        / workload.factor_update_steps,
        decompositions=max(rank_loads(plan, layers, calibration.costs))
        / workload.inverse_update_steps,
        precondition=max(flops) * calibration.seconds_per_flop,
        gradient_all_reduce=calibration.all_reduce_seconds(n, workload.parameter_elements * size),
        factor_all_reduce=calibration.all_reduce_seconds(
            n, float(traffic.factors) * workload.factor_update_steps / both_ways * size
        )
        / workload.factor_update_steps,
        second_order_broadcast=(
            calibration.broadcast_seconds(
                workers, float(traffic.second_order) * workload.inverse_update_steps * size
            )
            / workload.inverse_update_steps
        ),
        preconditioned_broadcast=calibration.broadcast_seconds(
            receivers, float(traffic.preconditioned_gradients) * size
        ),
        hessian=workload.hessian_seconds / workload.hessian_steps,
    )


def device_bytes(workload: Workload, plan: Plan, micro_batch_size: int) -> float:
    """Device memory of the rank that holds most: base, activations, factors and decompositions."""
    held = max(
        memory_elements(
            plan, workload.layers, method=workload.method, precompute=workload.precompute
        )
    )
    return (
        workload.base_bytes
        + workload.activation_bytes.at(micro_batch_size)
        + held * workload.element_bytes
    )


# -- choosing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A suggested plan and micro-batch, with their predicted time and memory."""

    plan: Plan
    micro_batch_size: int
    step_time: StepTime
    memory_bytes: float
    suggested_inverse_update_steps: int
    """Smallest t_i with decompositions and their broadcast below a tenth of the step."""

    @property
    def num_columns(self) -> int:
        """P."""
        return len(self.plan.columns)


def choose_plan(
    workload: Workload,
    calibration: Calibration,
    world_size: int,
    *,
    global_batch_size: int,
    memory_budget_bytes: float = math.inf,
    num_columns: int | None = None,
    max_micro_batch_size: int | None = None,
    current: Choice | None = None,
    hysteresis: float = 0.05,
) -> Choice:
    """The number of columns and the micro-batch with the least predicted time per step.

    With a fixed global batch the least time per step is the least time per sample. Up to 64 ranks every
    number of columns is tried, beyond that one per column size. Intervals and damping never change; a
    better t_i is only reported.

    Args:
        global_batch_size: Samples per step over all ranks.
        memory_budget_bytes: Budget per device.
        num_columns: Fixes P; only the micro-batch is chosen then.
        max_micro_batch_size: Upper bound of the micro-batch.
        current: The choice in use. Its P is kept unless the gain exceeds `hysteresis` or it no longer
            fits.
        hysteresis: Relative gain in time below which P does not change.

    Raises:
        ConfigError: If nothing fits the budget, not even one sample at a time.
    """
    candidates = [num_columns] if num_columns is not None else _column_candidates(world_size)
    if current is not None and num_columns is None and current.num_columns <= world_size:
        candidates = sorted({*candidates, current.num_columns})
    choices = []
    least = math.inf
    for columns in candidates:
        plan = make_plan(
            workload.layers,
            world_size,
            1.0 / columns,
            colocate=workload.colocate,
            costs=calibration.costs,
            previous=None if current is None else current.plan,
        )
        fixed = device_bytes(workload, plan, 0)
        least = min(least, device_bytes(workload, plan, 1))
        micro_batch = _best_micro_batch(
            workload,
            -(-global_batch_size // world_size),
            memory_budget_bytes - fixed,
            max_micro_batch_size,
        )
        if micro_batch is None:
            continue
        step_time = predict_step(
            workload,
            calibration,
            plan,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch,
        )
        choices.append(
            Choice(
                plan,
                micro_batch,
                step_time,
                device_bytes(workload, plan, micro_batch),
                _suggested_interval(workload, step_time),
            )
        )
    if not choices:
        raise ConfigError(
            "no plan fits plan.memory_budget_gib, not even one sample at a time",
            given=f"{memory_budget_bytes / 2**30:.3g} GiB",
            allowed=f"at least {least / 2**30:.3g} GiB on {world_size} ranks",
            change="raise the budget, use more ranks, or skip the widest layers",
        )
    best = min(choices, key=lambda choice: (choice.step_time.total, choice.num_columns))
    if current is not None:
        for choice in choices:
            kept = choice.num_columns == current.num_columns
            if kept and best.step_time.total >= (1 - hysteresis) * choice.step_time.total:
                return choice
    return best


def _column_candidates(world_size: int) -> list[int]:
    if world_size <= _ALL_COLUMNS_UP_TO:
        return list(range(1, world_size + 1))
    return sorted({-(-world_size // workers) for workers in range(1, world_size + 1)})


def _best_micro_batch(
    workload: Workload, share: int, room_bytes: float, upper: int | None
) -> int | None:
    """The size whose passes over a rank's share take the least time; the largest of equals."""
    slope = workload.activation_bytes.slope
    largest = share if upper is None else min(share, upper)
    if slope > 0:
        largest = min(largest, math.floor(min(room_bytes / slope, largest)))
    elif room_bytes < 0:
        largest = 0
    if largest < 1:
        return None
    sizes = np.arange(1, largest + 1)
    passes = -(-share // sizes)
    factor_share = 1.0 / workload.factor_update_steps
    fixed = workload.forward_backward.fixed + factor_share * workload.factor_statistics.fixed
    per_sample = workload.forward_backward.slope + factor_share * workload.factor_statistics.slope
    seconds = passes * (fixed + per_sample * sizes)
    return int(sizes[np.flatnonzero(seconds <= seconds.min() * (1 + 1e-12))[-1]])


def _suggested_interval(workload: Workload, step: StepTime) -> int:
    per_update = (step.decompositions + step.second_order_broadcast) * (
        workload.inverse_update_steps
    )
    rest = step.total - step.decompositions - step.second_order_broadcast
    if per_update == 0 or rest <= 0:
        return workload.factor_update_steps
    # x / t_i <= (rest + x / t_i) / 10
    steps = math.ceil(9 * per_update / rest)
    every = workload.factor_update_steps
    return max(every, -(-steps // every) * every)


# -- data-parallel against model-parallel ----------------------------------------------------------


@dataclass(frozen=True)
class CrossOver:
    """From data-parallel to model-parallel decompositions."""

    divide_from: int | None
    """N*: fewest ranks where dividing the layers and exchanging the results is faster than decomposing
    every layer on every rank; None if no tried number is."""
    flat_from: int
    """N**: ranks beyond which the longest share no longer shrinks (within 1 %)."""


def cross_over(workload: Workload, calibration: Calibration, *, max_ranks: int = 1024) -> CrossOver:
    """N* and N** of a model on a cluster.

    Tries every number of ranks up to the number of work units; beyond it only the exchange changes, so
    only powers of two are tried.
    """
    layers, costs = workload.layers, calibration.costs
    units = len(layers) * (1 if workload.colocate else 2)
    everything = sum(costs.a_seconds(layer) + costs.g_seconds(layer) for layer in layers)
    results = second_order_elements(layers, method=workload.method, precompute=workload.precompute)
    tried = [n for n in range(1, max_ranks + 1) if n <= units or n & (n - 1) == 0]
    shares = {}
    divide_from = None
    for n in tried:
        plan = make_plan(layers, n, 1.0, colocate=workload.colocate, costs=costs)
        shares[n] = max(rank_loads(plan, layers, costs), default=0.0)
        received = results * (n - 1) / n * workload.element_bytes
        exchange = calibration.broadcast_seconds(n, received)
        if divide_from is None and n > 1 and shares[n] + exchange < everything:
            divide_from = n
    flat = min(n for n in tried if shares[n] <= 1.01 * shares[tried[-1]])
    return CrossOver(divide_from, flat)
