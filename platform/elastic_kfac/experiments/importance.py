"""The share of a search's outcome that each parameter explains by itself.

The measure is Kruskal and Wallis' (1952) H as a share: points are ranked by the objective, those that
missed the target behind all others, and eta squared is the part of the ranks' variance that lies
between groups of equal or neighbouring values of the parameter. Ranks need no time for a censored
trial, and groups see an optimum in the middle of a range, which a correlation does not. Chance alone
gives (k - 1) / (n - 1) for k groups of n points; a share near that means nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from elastic_kfac.experiments.search_folder import Experiment
from elastic_kfac.experiments.trials import is_real

FEWEST = 4
"""Points below which no share is given."""
RELIABLE = 12
"""Points from which the shares are more than a hint."""
MOST_VALUES = 4
"""Different values up to which each is a group of its own."""


@dataclass(frozen=True)
class Importance:
    """One parameter's share."""

    parameter: str
    share: float
    """Eta squared of the ranks, 0 to 1."""
    chance: float
    """The mean share of a parameter without any effect."""
    groups: int


def importances(experiment: Experiment) -> tuple[list[Importance], int]:
    """The shares, largest first, and the number of points they are computed from.

    Failed and refused points are left out: the way they ended is no measure of time.
    """
    points = [point for point in experiment.points if point.tried]
    if len(points) < FEWEST:
        return [], len(points)
    ranks = midranks([point.rank for point in points])
    found = []
    for name in experiment.parameters:
        labels = groups_of([point.parameters.get(name) for point in points])
        count = len(set(labels))
        if count > 1:
            chance = (count - 1) / (len(points) - 1)
            found.append(Importance(name, eta_squared(ranks, labels), chance, count))
    found.sort(key=lambda each: (-(each.share - each.chance), each.parameter))
    return found, len(points)


def midranks(keys: Sequence[tuple[int, float]]) -> list[float]:
    """Ranks from 1; equal keys share the mean of theirs."""
    ordered = sorted(keys)
    first = {key: ordered.index(key) for key in set(keys)}
    return [first[key] + (ordered.count(key) + 1) / 2 for key in keys]


def eta_squared(ranks: Sequence[float], labels: Sequence[Hashable]) -> float:
    """The part of the ranks' variance between groups; 0 when all ranks are equal."""
    mean = statistics.fmean(ranks)
    total = sum((rank - mean) ** 2 for rank in ranks)
    if total == 0.0:
        return 0.0
    between = 0.0
    for label in set(labels):
        group = [rank for rank, other in zip(ranks, labels, strict=True) if other == label]
        between += len(group) * (statistics.fmean(group) - mean) ** 2
    return between / total


def groups_of(values: Sequence[object]) -> list[Hashable]:
    """A label per value: few different values label themselves, many numbers are cut into parts.

    Two parts below nine values, three from there; equal numbers are never parted.
    """
    names = [repr(value) for value in values]
    numbers = [value for value in values if is_real(value)]
    if len(set(names)) <= MOST_VALUES or len(numbers) < len(values):
        return list(names)
    parts = 3 if len(values) >= 9 else 2
    return [parts * sum(other < value for other in numbers) // len(numbers) for value in numbers]
