"""Targets, scores and performance profiles (Dahl et al. 2023, Benchmarking Neural Network Training
Algorithms, sections 4 and 5; scaled down)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

TAU = 4.0
Runs = Sequence[Mapping[str, Any]]
"""Each with `workload`, `method`, `study`, `point` and `curve`: (step, CPU seconds, metric); those that
were repeated up to the target with `again`: `target` and `cpu_s`."""


def target(runs: Runs, workload: str, methods: Sequence[str]) -> float:
    """The best method's median over studies of the best point's final metric (lower is better)."""
    medians = []
    for method in methods:
        studies: dict[int, float] = {}
        for run in _of(runs, workload, method):
            last = run["curve"][-1][2]
            value = math.inf if last is None else last
            studies[run["study"]] = min(value, studies.get(run["study"], math.inf))
        medians.append(statistics.median(studies.values()))
    return min(medians)


def reached(run: Mapping[str, Any], goal: float) -> tuple[float, float]:
    """Steps and CPU seconds to the target; a miss is infinite."""
    for step, seconds, metric in run["curve"]:
        if metric is not None and metric <= goal:
            return step, run["again"]["cpu_s"] if is_timed(run, goal) else seconds
    return math.inf, math.inf


def is_timed(run: Mapping[str, Any], goal: float) -> bool:
    """Whether a run was repeated up to this target."""
    return "again" in run and run["again"]["target"] == goal


def score(runs: Runs, workload: str, method: str, goal: float, column: int) -> list[float]:
    """Per study, the fastest point; in CPU seconds, of the points that were repeated, if any were."""
    studies: dict[int, list[Mapping[str, Any]]] = {}
    for run in _of(runs, workload, method):
        studies.setdefault(run["study"], []).append(run)
    found = []
    for _, points in sorted(studies.items()):
        timed = [run for run in points if is_timed(run, goal)]
        found.append(min(reached(run, goal)[column] for run in timed or points))
    return found


def fastest(runs: Runs, workload: str, goal: float) -> list[Mapping[str, Any]]:
    """The points to repeat, so that CPU seconds of all methods are of one time: of each study and
    method the one with the fewest steps to the target and the one with the least CPU time; methods take
    turns."""
    places: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["workload"] == workload and math.isfinite(reached(run, goal)[0]):
            places.setdefault((run["study"], run["method"]), []).append(run)
    chosen: dict[tuple[int, int, str], Mapping[str, Any]] = {}
    for (study, method), points in places.items():
        chosen[study, 0, method] = by_steps = min(points, key=lambda run: reached(run, goal))
        by_time = min(points, key=lambda run: reached(run, goal)[::-1])
        if by_time is not by_steps:
            chosen[study, 1, method] = by_time
    return [chosen[key] for key in sorted(chosen)]


def profile(times: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """Each method's ratios to the fastest, by workload; infinite where it missed.

    Args:
        times: By workload, then by method. Workloads that nobody finished count for nobody.
    """
    ratios: dict[str, list[float]] = {}
    for row in times.values():
        best = min(row.values())
        for method, value in row.items():
            ratio = value / best if math.isfinite(value) else math.inf
            ratios.setdefault(method, []).append(ratio)
    return ratios


def share_within(ratios: Sequence[float], tau: float) -> float:
    """ρ(τ): the share of workloads on which the method is at most τ times slower than the fastest."""
    return sum(r <= tau for r in ratios) / len(ratios)


def profile_score(ratios: Sequence[float]) -> float:
    """∫₁^τ ρ(r) dr / (τ − 1): 1 for the fastest everywhere, 0 for one who never comes within τ."""
    return sum(max(0.0, TAU - r) for r in ratios if r <= TAU) / (TAU - 1) / len(ratios)


def advantage(times: Mapping[str, Mapping[str, float]], ours: str, others: Sequence[str]) -> float:
    """Geometric mean over workloads of the best other method's cost over ours."""
    logs = [
        math.log(min(row[other] for other in others) / row[ours])
        for row in times.values()
        if math.isfinite(row[ours]) and math.isfinite(min(row[other] for other in others))
    ]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def table(
    runs: Runs, workloads: Sequence[str], methods: Sequence[str], goals: Mapping[str, float]
) -> Callable[[int], dict[str, dict[str, float]]]:
    """Median scores by workload and method, as a function of the column: 0 steps, 1 CPU seconds."""

    def of(column: int) -> dict[str, dict[str, float]]:
        return {
            w: {m: statistics.median(score(runs, w, m, goals[w], column)) for m in methods}
            for w in workloads
        }

    return of


def _of(runs: Runs, workload: str, method: str) -> list[Mapping[str, Any]]:
    found = [r for r in runs if r["workload"] == workload and r["method"] == method]
    if not found:
        raise ValueError(f"no run of {method} on {workload}")
    return found
