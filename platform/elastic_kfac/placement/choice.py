"""Choices by predicted time: the fraction of gradient workers, the micro-batch, how many ranks help.

`choose_plan` finds the number of columns and the micro-batch with the least time at a fixed global batch
under a memory budget; `auto_fraction` finds the columns alone, for `grad_worker_frac: auto` in a run.
`cross_over` finds the number of ranks from which dividing the decompositions pays, and the one beyond
which it no longer helps.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from elastic_kfac.errors import ConfigError
from elastic_kfac.placement.costs import LayerShape, factor_elements, second_order_elements
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.planner import (
    make_plan,
    max_second_order_elements,
    over_budget,
    rank_loads,
)
from elastic_kfac.placement.simulator import (
    Calibration,
    Line,
    StepTime,
    Workload,
    device_bytes,
    predict_step,
)

HYSTERESIS = 0.05
"""Relative gain in time below which the number of columns does not change."""
_ALL_COLUMNS_UP_TO = 64


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
    hysteresis: float = HYSTERESIS,
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
    share = -(-global_batch_size // world_size)
    largest = share if max_micro_batch_size is None else min(share, max_micro_batch_size)
    for columns in candidates:
        plan = make_plan(
            workload.layers,
            world_size,
            1.0 / columns,
            colocate=workload.colocate,
            costs=calibration.costs,
            speeds=calibration.decomposition_speeds(world_size),
            previous=None if current is None else current.plan,
        )
        needed = partial(_needed, workload, plan, share)
        least = min(least, needed(1), needed(largest))
        if largest == share and needed(share) <= memory_budget_bytes:
            micro_batch = share
        else:
            sizes = range(1, min(largest, share - 1) + 1)
            fits = bisect.bisect_right(sizes, memory_budget_bytes, key=needed)
            if not fits:
                continue
            micro_batch = _best_micro_batch(workload, share, fits)
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
                needed(micro_batch),
                _suggested_interval(workload, step_time),
            )
        )
    if not choices:
        raise ConfigError(
            "no plan fits the memory budget, not even one sample at a time",
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


@dataclass(frozen=True)
class AutoFraction:
    """The outcome of `grad_worker_frac: auto`."""

    num_columns: int
    reason: str
    """In words, with the predicted times."""

    @property
    def fraction(self) -> float:
        """Share of gradient workers."""
        return 1.0 / self.num_columns


def kfac_workload(layers: Sequence[LayerShape], **options: object) -> Workload:
    """A workload of which only the parts that a plan places take time."""
    nothing = Line(0.0, 0.0)
    elements = sum(layer.weight_elements for layer in layers)
    return Workload(tuple(layers), elements, nothing, nothing, (nothing,), **options)  # type: ignore[arg-type]


def auto_fraction(
    workload: Workload,
    calibration: Calibration,
    world_size: int,
    *,
    memory_budget_bytes: float | None = None,
    previous: Plan | None = None,
) -> AutoFraction:
    """The fraction for `grad_worker_frac: auto`: the one with the least predicted time per step.

    Only time that depends on the plan is compared: decompositions, products and the exchange of both.
    With free arithmetic and no latencies it is the traffic w (1 - f) + e (f - 1/N) / t_i, whose optimum
    is an end point (KAISA, Pauloski et al., SC'21); arithmetic and latencies make shares between them
    the best.

    Args:
        memory_budget_bytes: Budget per rank for factors and decompositions together.
        previous: The plan in use; its number of columns is kept unless another gains `HYSTERESIS`.

    Raises:
        ConfigError: If not even one gradient worker per layer fits the budget.
    """
    layers, size = workload.layers, workload.element_bytes
    options = {"method": workload.method, "precompute": workload.precompute}
    s, e = factor_elements(layers), second_order_elements(layers, **options)  # type: ignore[arg-type]
    budget = math.inf if memory_budget_bytes is None else memory_budget_bytes / size
    candidates = set(_column_candidates(world_size))
    if previous is not None and len(previous.columns) <= world_size:
        candidates.add(len(previous.columns))
    seconds: dict[int, float] = {}
    for columns in sorted(candidates):
        # The average rank holds at least this much, which rules out most fractions without a plan.
        if s + e * (world_size // columns) / world_size > budget:
            continue
        plan = make_plan(
            layers,
            world_size,
            1.0 / columns,
            colocate=workload.colocate,
            costs=calibration.costs,
            speeds=calibration.decomposition_speeds(world_size),
        )
        if s + max_second_order_elements(plan, layers, **options) > budget:  # type: ignore[arg-type]
            continue
        step = predict_step(
            workload, calibration, plan, global_batch_size=world_size, micro_batch_size=1
        )
        seconds[columns] = step.placed
    if not seconds:
        plan = make_plan(layers, world_size, 1.0 / world_size, costs=calibration.costs)
        least = s + max_second_order_elements(plan, layers, **options)  # type: ignore[arg-type]
        raise over_budget(memory_budget_bytes or 0.0, least * size, plan)
    best = min(seconds, key=lambda columns: (seconds[columns], columns))
    limited = "" if len(seconds) == len(candidates) else " within the memory budget"
    reason = f"least predicted time{limited}: {seconds[best] * 1e3:.3g} ms a step"
    if previous is not None:
        now = len(previous.columns)
        if now not in seconds:
            gone = "does not fit the budget" if now <= world_size else "needs more ranks"
            reason = f"{now} columns: {gone}; {reason}"
        elif best != now:
            gain = 1 - seconds[best] / seconds[now]
            if gain < HYSTERESIS:
                reason = (
                    f"{now} columns kept: {best} would gain {gain:.1%}, less than {HYSTERESIS:.0%}"
                )
                best = now
            else:
                reason = f"{reason}, {gain:.1%} less than with {now} columns"
    return AutoFraction(best, reason)


def _column_candidates(world_size: int) -> list[int]:
    if world_size <= _ALL_COLUMNS_UP_TO:
        return list(range(1, world_size + 1))
    return sorted({-(-world_size // workers) for workers in range(1, world_size + 1)})


def _needed(workload: Workload, plan: Plan, share: int, size: int) -> float:
    """`device_bytes` of passes over so many of the samples of a rank."""
    return device_bytes(workload, plan, size, accumulates=size < share)


def _best_micro_batch(workload: Workload, share: int, largest: int) -> int:
    """The size whose passes over a rank's share take the least time; the largest of equals."""
    import numpy as np

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
