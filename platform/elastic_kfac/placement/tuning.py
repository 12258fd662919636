"""Intervals and damping chosen again where the cost of a step has changed (`plan.retune`).

Statistics and decompositions are to take at most a tenth of a step. Both intervals change by one factor,
so that a decomposition sees as many new statistics as before. γ outweighs the error of the curvature in
use. Of that error two parts are known to grow: with the age of the curvature, as a random walk does (the
square root of the interval), and with the noise of a batch (the inverse square root of its samples).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from elastic_kfac.placement.choice import HYSTERESIS

SHARE = 0.1
"""Of a step, for statistics and decompositions together."""
MOST = 10
"""By how much intervals may be longer than configured: older curvature costs steps."""

Shares = tuple[float, float]
"""Of all statistics, and of all decompositions, that one step has."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step by what is in it."""

    plain: float
    statistics: float
    """More, if all statistics are due."""
    decompositions: float
    """More, if all decompositions are due."""

    def refresh(self, intervals: tuple[int, int]) -> float:
        """Of statistics and decompositions in the average step."""
        return self.statistics / intervals[0] + self.decompositions / intervals[1]

    def step(self, intervals: tuple[int, int]) -> float:
        """The average step."""
        return self.plain + self.refresh(intervals)


def fit_step_cost(seconds: Mapping[Shares, Sequence[float]]) -> StepCost | None:
    """Least squares, with no part below zero, over the median of the steps with equal shares.

    What no step varies cannot be told from the rest of a step and counts as such; None without steps.
    """
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    if not seconds:
        return None
    shares = np.array(list(seconds), dtype=np.float64)
    medians = np.array([statistics.median(values) for values in seconds.values()])
    counts = np.sqrt([len(values) for values in seconds.values()])
    columns = [np.ones(len(shares)), *shares.T]
    varied = [0, *(i for i in (1, 2) if np.ptp(columns[i]) > 0)]
    table = np.stack([columns[i] for i in varied], axis=1)
    found, _ = nnls(table * counts[:, None], medians * counts)
    parts = dict(zip(varied, map(float, found), strict=True))
    return StepCost(parts[0], parts.get(1, 0.0), parts.get(2, 0.0))


def choose_intervals(
    cost: StepCost, given: tuple[int, int], current: tuple[int, int]
) -> tuple[int, int]:
    """(`factor_update_steps`, `inverse_update_steps`): the shortest of which statistics and
    decompositions take at most `SHARE` of a step, up to `MOST` times what is `given`.

    Those in use stay where they are less than twice or half as long and the predicted step would change
    by less than `HYSTERESIS`.
    """
    candidates = []
    for factor_steps in range(1, MOST * given[0] + 1):
        inverse_steps = max(1, round(given[1] * factor_steps / given[0]))
        candidates.append((factor_steps, inverse_steps))
    best = candidates[-1]
    for intervals in candidates:
        if cost.refresh(intervals) <= SHARE * cost.step(intervals):
            best = intervals
            break
    is_near = best[1] < 2 * current[1] < 4 * best[1]
    change = abs(cost.step(best) - cost.step(current))
    return current if is_near and change < HYSTERESIS * cost.step(current) else best


def tuned_damping(given: float, age: float, batch: float) -> float:
    """γ for curvature that is `age` times as old, and batches `batch` times as large, as `given`."""
    return given * math.sqrt(age / batch)
