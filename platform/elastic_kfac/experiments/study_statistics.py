"""Means over seeds, and paired intervals that judge claims.

Cells with the same seed start from the same weights and see the samples in the same order, so they are
compared in pairs: the differences d_s = left_s − right_s over the seeds that both sides have are taken as
a sample of a normal distribution, and mean(d) ± t(0.975; n−1)·sd(d)/√n is the 95 % interval of the paired
t test. Ratios are differences of logarithms. A claim holds when the whole interval is within its bounds,
fails when the whole interval is outside, and is undecided in between.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from scipy.special import stdtrit  # type: ignore[import-untyped]

CONFIDENCE: Final = 0.95
TEST: Final = "paired t interval over seeds, 95 %"

Verdict = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True)
class Summary:
    """Mean and spread of one quantity over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for a single seed."""
    count: int


def summarise(values: Sequence[float]) -> Summary | None:
    """The summary of some values; None when there are none."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.fmean(values), deviation, len(values))


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a mean; from one pair there is only the mean."""

    mean: float
    low: float | None
    high: float | None
    count: int
    """Seeds."""


def paired_interval(
    left: Mapping[int, float], right: Mapping[int, float], *, ratio: bool = False
) -> Interval | None:
    """The interval of left − right, or of left / right, over the seeds that both have.

    Args:
        ratio: Whether to compare logarithms; the interval is of the geometric mean of the quotients.

    Returns:
        None where nothing can be compared: no common seed, or a value without a logarithm.
    """
    seeds = sorted(left.keys() & right.keys())
    if ratio:
        if any(values[seed] <= 0 for values in (left, right) for seed in seeds):
            return None
        found = interval_of_mean([math.log(left[s]) - math.log(right[s]) for s in seeds])
        return None if found is None else _exponential(found)
    return interval_of_mean([left[s] - right[s] for s in seeds])


def interval_of_mean(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Student's interval of the mean of a normal distribution; None without values."""
    if not values or not all(map(math.isfinite, values)):
        return None
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, None, 1)
    quantile = float(stdtrit(count - 1, (1 + confidence) / 2))
    reach = quantile * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - reach, mean + reach, count)


def _exponential(interval: Interval) -> Interval:
    low, high = interval.low, interval.high
    return Interval(
        math.exp(interval.mean),
        None if low is None else math.exp(low),
        None if high is None else math.exp(high),
        interval.count,
    )


@dataclass(frozen=True)
class Bounds:
    """The range of a mean that a claim asserts."""

    low: float = -math.inf
    high: float = math.inf
    low_is_inside: bool = True
    high_is_inside: bool = True

    def judge(self, interval: Interval | None) -> Verdict:
        """The verdict of an interval; without one the claim is undecided."""
        if interval is None or interval.low is None or interval.high is None:
            return "undecided"
        low, high = interval.low, interval.high
        above = low >= self.low if self.low_is_inside else low > self.low
        below = high <= self.high if self.high_is_inside else high < self.high
        if above and below:
            return "holds"
        too_low = high < self.low if self.low_is_inside else high <= self.low
        too_high = low > self.high if self.high_is_inside else low >= self.high
        return "fails" if too_low or too_high else "undecided"


def joint(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of several comparisons: holds if all hold, fails if one fails.

    No correction for their number: a conjunction of tests at a level has that level (the
    intersection-union test), and a single failure is shown with its own interval.
    """
    if "fails" in verdicts:
        return "fails"
    return "holds" if verdicts and all(v == "holds" for v in verdicts) else "undecided"
