"""Predicted seconds and bytes of a training step.

    T = T_fb(n) accum + (T_fac(n) accum + T_average) / t_f + max_r Σ_owned (c0 + c1 d^p) / t_i
        + max_r T_precondition + T_bound + T_optimizer + Σ collectives (alpha steps + beta bytes)
        + T_hess / t_h

Everything is a pure function of measurements, so all ranks with the same calibration, and a laptop
planning for 1024 ranks, compute the same result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from elastic_kfac.errors import UsageError
from elastic_kfac.placement.costs import (
    CostModel,
    LayerShape,
    Method,
    factor_elements,
    precondition_flops,
    second_order_elements,
)
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.planner import rank_loads
from elastic_kfac.placement.shares import shares
from elastic_kfac.placement.traffic import memory_elements, traffic_per_step


@dataclass(frozen=True)
class Line:
    """A measured straight line: `fixed` + `slope` x."""

    fixed: float
    slope: float

    def at(self, x: float) -> float:
        """Its value."""
        return self.fixed + self.slope * x

    def __str__(self) -> str:
        """Of a link: latency and bandwidth."""
        rate = "unlimited bandwidth" if self.slope <= 0 else f"{8e-9 / self.slope:.3g} Gbit/s"
        return f"{self.fixed * 1e6:.3g} µs and {rate}"


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Least squares with neither coefficient below zero (a latency and a cost per unit)."""
    import numpy as np

    if len(x) != len(y) or len(set(x)) < 2:
        raise UsageError("a line needs measurements at two different points", given=list(x))
    # In relative error: what is measured grows with x, and so does its noise.
    weights = 1.0 / np.maximum(np.abs(y), 1e-12 * max(map(abs, y), default=1.0) or 1.0)
    slope, fixed = (float(value) for value in np.polyfit(x, y, 1, w=weights))
    if slope < 0:
        return Line(float(np.mean(y)), 0.0)
    if fixed < 0:
        xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        return Line(0.0, float(xs @ ys / (xs @ xs)))
    return Line(fixed, slope)


class RankSpeed(NamedTuple):
    """How many times as fast as the calibrated host a rank is."""

    passes: float = 1.0
    """At matrix products: passes and preconditioning."""
    decompositions: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """Measured costs of a kind of host and its network."""

    costs: CostModel
    """Seconds per decomposition."""
    seconds_per_flop: float
    """Time per floating-point operation of the products that precondition a gradient, where the layers
    themselves were not measured."""
    network: Line
    """Seconds of a message of x bytes between nodes (alpha + beta x)."""
    inside_node: Line | None = None
    """The same inside a node; `network` if None."""
    ranks_per_node: int = 1
    seconds_per_layer: float = 0.0
    """Time to precondition a layer however small it is, where the layers were not measured."""
    seconds_per_copied_byte: float = 0.0
    """Time to move a byte into a buffer to send, and out again."""
    seconds_per_call: float = 0.0
    """Time that the host computes for one collective, however small it is."""
    speeds: tuple[RankSpeed, ...] = ()
    """Of the ranks of one world, where they get unequal shares; empty where all count as equal."""

    def decomposition_speeds(self, world_size: int) -> list[float]:
        """What `make_plan` takes of them."""
        return [speed.decompositions for speed in self.speeds_of(world_size)]

    def speeds_of(self, world_size: int) -> tuple[RankSpeed, ...]:
        """Speeds of all ranks of that world; empty where none are known, or all are the same."""
        known = self.speeds if len(self.speeds) == world_size else ()
        return known if len(set(known)) > 1 else ()

    def precondition_seconds(self, layer: LayerShape, method: Method) -> float:
        """Estimated time to precondition one gradient."""
        flops = precondition_flops(layer, method=method)
        return self.seconds_per_layer + self.seconds_per_flop * flops

    def all_reduce_seconds(self, world_size: int, size: float) -> float:
        """Ring inside a node, Rabenseifner between nodes."""
        nodes, inside = self._nodes(world_size)
        local = self.inside_node or self.network
        seconds = _exchange(local, 2 * (inside - 1), 2 * (inside - 1) / inside * size)
        between = 2 * (nodes - 1) / nodes * size / inside
        return seconds + _exchange(self.network, all_reduce_rounds(nodes), between)

    def broadcast_seconds(self, group_size: int, size: float) -> float:
        """A tree over the network: one latency per level, every byte once."""
        if group_size <= 1:
            return 0.0
        return _exchange(self.network, math.ceil(math.log2(group_size)), size)

    def _nodes(self, world_size: int) -> tuple[int, int]:
        inside = min(self.ranks_per_node, world_size)
        return -(-world_size // inside), inside


def all_reduce_rounds(nodes: int) -> int:
    """Messages one after the other in Rabenseifner's all-reduce."""
    return 2 * math.ceil(math.log2(nodes)) if nodes > 1 else 0


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
    step_bytes: tuple[Line, ...]
    """Device memory of a step of x samples, factors and decompositions not included: the largest of these
    lines. With few samples the step needs more than the passes, and each further one adds less."""
    exchange_bytes: float = 0.0
    """What is held when statistics are sent, factors and decompositions not included."""
    decomposing_bytes: float = 0.0
    """What is held when new decompositions are sent, these not included either."""
    index_bytes: float = 0.0
    """What a rank among others keeps to pack triangles."""
    bucket_bytes: float = 25 * 2**20
    """Largest buffer: a larger tensor is sent without a copy."""
    symmetric: bool = True
    """Whether factors travel as triangles."""
    factor_update_steps: int = 1
    inverse_update_steps: int = 10
    statistics_steps: int = 1
    """Steps of a factor interval in which statistics of some layers are due: more than one where they are
    spread."""
    decomposition_steps: int = 1
    """Steps of an inverse interval in which decompositions of some layers are due."""
    method: Method = "eigen"
    precompute: bool = True
    colocate: bool = True
    element_bytes: int = 4
    precondition_s: tuple[float, ...] = ()
    """Measured seconds to precondition each of `layers`; empty takes the calibration's estimate."""
    factor_update_s: float = 0.0
    """Seconds to move the running averages of all layers, which every rank does every t_f steps."""
    packing_s: float = 0.0
    """Seconds to pack the statistics of all layers for the other ranks and to unpack their sums."""
    statistics_step_s: float = 0.0
    """Seconds that each further step with statistics takes beyond the work of its layers."""
    bound_s: float = 0.0
    """Seconds per step to read gradients, bound the step and write them back, on every rank."""
    optimizer_s: float = 0.0
    """Seconds of the first-order optimizer's step."""
    hessian_seconds: float = 0.0
    """Seconds of one Hessian analysis."""
    hessian_steps: int = 1
    """Steps between two of them."""


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of the average step, by phase."""

    forward_backward: float
    factor_statistics: float
    """Sums of outer products, and running averages."""
    decompositions: float
    precondition: float
    bound: float
    """Reading gradients, the trust region or KL clip, writing gradients."""
    optimizer: float
    packing: float
    """Copies into and out of the buffers that are sent, and calls."""
    gradient_all_reduce: float
    factor_all_reduce: float
    second_order_broadcast: float
    preconditioned_broadcast: float
    hessian: float

    @property
    def total(self) -> float:
        """Seconds per step."""
        return float(sum(self.parts.values()))

    @property
    def parts(self) -> dict[str, float]:
        """Seconds per step by phase."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def placed(self) -> float:
        """Seconds per step that depend on the plan."""
        return (
            self.decompositions
            + self.precondition
            + self.second_order_broadcast
            + self.preconditioned_broadcast
        )


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
    known = calibration.speeds_of(n)
    speeds = known or (RankSpeed(),) * n
    own = [-(-global_batch_size // n)] * n
    if known:
        own = [len(part) for part in shares(global_batch_size, [speed.passes for speed in known])]

    def passes_s(line: Line) -> float:
        """Of the slowest rank's share."""
        return max(
            -(-share // micro_batch_size) * line.at(min(micro_batch_size, share)) / speed.passes
            for share, speed in zip(own, speeds, strict=True)
            if share
        )

    layers, size = workload.layers, workload.element_bytes
    traffic = traffic_per_step(
        plan,
        layers,
        factor_update_steps=workload.factor_update_steps,
        inverse_update_steps=workload.inverse_update_steps,
        parameter_elements=workload.parameter_elements,
        method=workload.method,
        precompute=workload.precompute,
        symmetric=workload.symmetric,
    )
    products = [0.0] * len(plan.columns)
    for index, layer in enumerate(layers):
        products[plan.placement(layer.name).column] += (
            workload.precondition_s[index]
            if workload.precondition_s
            else calibration.precondition_seconds(layer, workload.method)
        )
    send_factors = float(traffic.factors) * workload.factor_update_steps
    send_second_order = float(traffic.second_order) * workload.inverse_update_steps
    send_products = float(traffic.preconditioned_gradients)
    copied = (workload.parameter_elements if n > 1 else 0) + send_products
    copied += send_second_order / workload.inverse_update_steps
    columns = len(plan.columns)
    workers = max(len(column) for column in plan.columns)
    # Gradients; counts and sums of statistics; decompositions of every rank of the column; results of
    # every column.
    calls = 0.0
    if n > 1:
        calls += 1 + 2 * workload.statistics_steps / workload.factor_update_steps
        if workers > 1:
            sent = max(_most_owners(plan), workload.decomposition_steps)
            calls += sent / workload.inverse_update_steps
        calls += (columns > 1) * columns
    receivers = -(-n // workers)
    both_ways = (n - 1) / n * 2 if n > 1 else 1.0
    return StepTime(
        forward_backward=passes_s(workload.forward_backward),
        factor_statistics=(
            passes_s(workload.factor_statistics)
            + workload.factor_update_s
            + (workload.statistics_steps - 1) * workload.statistics_step_s
        )
        / workload.factor_update_steps,
        decompositions=max(
            rank_loads(plan, layers, calibration.costs, calibration.decomposition_speeds(n))
        )
        / workload.inverse_update_steps,
        precondition=max(
            seconds / min(speeds[rank].passes for rank in ranks)
            for seconds, ranks in zip(products, plan.columns, strict=True)
        ),
        bound=workload.bound_s,
        optimizer=workload.optimizer_s,
        packing=calls * calibration.seconds_per_call
        + size * copied * calibration.seconds_per_copied_byte
        + (n > 1) * workload.packing_s / workload.factor_update_steps,
        gradient_all_reduce=calibration.all_reduce_seconds(n, workload.parameter_elements * size),
        factor_all_reduce=calibration.all_reduce_seconds(n, send_factors / both_ways * size)
        / workload.factor_update_steps,
        second_order_broadcast=(
            calibration.broadcast_seconds(workers, send_second_order * size)
            / workload.inverse_update_steps
        ),
        preconditioned_broadcast=calibration.broadcast_seconds(receivers, send_products * size),
        hessian=workload.hessian_seconds / workload.hessian_steps,
    )


def _most_owners(plan: Plan) -> int:
    """Ranks that decompose layers of a column, in the column with most of them."""
    owners: dict[int, set[int]] = {}
    for layer in plan.layers:
        owners.setdefault(layer.column, set()).update((layer.a_worker, layer.g_worker))
    return max(map(len, owners.values()), default=0)


def device_bytes(
    workload: Workload, plan: Plan, micro_batch_size: int, *, accumulates: bool = False
) -> float:
    """Device memory of the rank that holds most, factors and decompositions included.

    The most is needed either at the end of the forward pass, which grows with the samples, or in the
    step that follows; with several ranks perhaps where factors or decompositions are in buffers.

    Args:
        accumulates: Whether a step has several passes: the sum of one pass for a factor is then beside
            the sums that it is added to.
    """
    layers, size = workload.layers, workload.element_bytes
    held = size * max(
        memory_elements(plan, layers, method=workload.method, precompute=workload.precompute)
    )
    alone = max(line.at(micro_batch_size) for line in workload.step_bytes) + held
    if accumulates:
        widest = (max(x.a_blocks * x.a_dim**2, x.g_blocks * x.g_dim**2) * x.copies for x in layers)
        alone += size * max(widest, default=0)
    if plan.world_size == 1:
        return alone
    packed = [size * factor_elements([x], packed=workload.symmetric) for x in layers]
    buffers: float = sum(packed) if workload.statistics_steps == 1 else max(packed, default=0)
    most = max(alone, workload.exchange_bytes + held + buffers)
    if max(map(len, plan.columns)) > 1:
        most = max(most, workload.decomposing_bytes + held + _sent_bytes(workload, plan))
    return workload.index_bytes + most


def _sent_bytes(workload: Workload, plan: Plan) -> float:
    """New decompositions of the fullest column beside the old ones, and the buffers they are sent in."""
    size, by_column = workload.element_bytes, dict[int, list[float]]()
    for layer in workload.layers:
        elements = second_order_elements(
            [layer], method=workload.method, precompute=workload.precompute
        )
        widest = size * max(layer.a_dim, layer.g_dim) ** 2
        copies = 1 if widest > workload.bucket_bytes else 2
        sent = by_column.setdefault(plan.placement(layer.name).column, [])
        sent.append(float(copies * size * elements))
    due = sum if workload.decomposition_steps == 1 else max
    return max(map(due, by_column.values()), default=0.0)
