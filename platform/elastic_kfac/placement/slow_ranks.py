"""Ranks that compute slowly: who they are, from the times that travel with the gradients.

In a synchronous step every rank waits for the slowest. Each rank therefore sends the seconds of its own
passes, without what it waited for others, and all of them judge alike. A rank's slowness in a step is
its time per unit of work over the median of the other ranks:

    slowness = t / (n + k)  ÷  median of t / (n + k) over the others

n is its share of the batch in samples (divided by its speed, where shares were unequal from the start),
and k is the fixed cost of a pass in samples: nothing is known of it, and nothing depends on it, until a
slow rank gets a smaller share. Then its time falls by less than its share, and k follows from by how
much; without it the rank would seem to become slower with every sample that is taken from it.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from elastic_kfac.config.elastic import ElasticConfig

WINDOW = 12
"""Newest steps that count."""
AGREE = 10
"""Of them must say the same before anything follows: a rank is named within 10 to 12 slow steps."""
WARM_UP = 3
"""Steps of a world whose times mean nothing."""
_DRIFT = 1.25
"""Change of a named rank's slowness that is worth other shares."""


@dataclass(frozen=True)
class Verdict:
    """A rank has become slow, slow by another factor, or as fast as the others again."""

    rank: int
    factor: float
    """Median slowness over the window."""
    is_slow: bool

    def in_words(self, host: str) -> str:
        """For an event."""
        if not self.is_slow:
            return f"rank {self.rank} on {host} is as fast as the others again"
        return (
            f"rank {self.rank} on {host} takes {self.factor:.1f} times as long per sample as the "
            "median of the others"
        )


class SlowRanks:
    """Names the slow ranks of one world from the times of its steps.

    A rank is slow when nearly all steps of the window say so, and no longer slow when nearly all of them
    are below the geometric mean of the threshold and 1: one step, or noise about the threshold, changes
    nothing.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.factors: dict[int, float] = {}
        """Slowness of the slow ranks."""
        self._speeds: list[float] = []
        self._overhead = 0.0
        self._warm_up = WARM_UP
        self._seen: deque[Seen] = deque(maxlen=WINDOW)
        self._slowness: deque[list[float]] = deque(maxlen=WINDOW)
        self._before: Seen | None = None
        """A step of median times before the shares changed, until their effect is known."""

    @classmethod
    def of(cls, config: ElasticConfig) -> SlowRanks | None:
        """None where nobody watches."""
        threshold = config.slow_factor
        return None if threshold is None else cls(threshold)

    def enter(self, speeds: Sequence[float]) -> None:
        """Begins another world; its ranks are expected to have these relative speeds."""
        self.factors, self._speeds = {}, list(speeds)
        self._overhead, self._warm_up, self._before = 0.0, WARM_UP, None
        self._seen.clear()
        self._slowness.clear()

    @property
    def slowness(self) -> list[float]:
        """Of every rank in the newest step; empty before there was one."""
        return self._slowness[-1] if self._slowness else []

    def saw(self, seconds: Sequence[float], samples: Sequence[int]) -> list[Verdict]:
        """Takes note of a step; what follows from it. Steps in which a rank has no samples, as at the
        end of an epoch, are left out.

        Args:
            seconds: Of every rank's own passes.
            samples: Of every rank's share.
        """
        if self._warm_up:
            self._warm_up -= 1
            return []
        if 0 in samples:
            return []
        work = [n / speed for n, speed in zip(samples, self._speeds, strict=True)]
        step = Seen(list(seconds), work)
        self._seen.append(step)
        self._slowness.append(slowness_of(step, self._overhead))
        if len(self._seen) < WINDOW:
            return []
        if self._before is not None:
            self._overhead = self._fitted_overhead(self._before, _typical(self._seen))
            self._slowness.extend([slowness_of(step, self._overhead) for step in self._seen])
            self._before = None
        columns = enumerate(zip(*self._slowness, strict=True))
        verdicts = [v for rank, values in columns if (v := self._judge(rank, values)) is not None]
        if verdicts:
            self._before = _typical(self._seen)
            self._seen.clear()
        return verdicts

    def _judge(self, rank: int, values: Sequence[float]) -> Verdict | None:
        # Shares of equal merit are cut in one way, not by the last bits of a clock.
        factor = round(statistics.median(values), 2)
        known = self.factors.get(rank)
        if known is None:
            if sum(value >= self.threshold for value in values) < AGREE:
                return None
        elif sum(value < self.threshold**0.5 for value in values) >= AGREE:
            del self.factors[rank]
            return Verdict(rank, factor, is_slow=False)
        elif (
            max(sum(v < known / _DRIFT for v in values), sum(v > known * _DRIFT for v in values))
            < AGREE
        ):
            return None
        elif factor < self.threshold**0.5:
            # Much faster than it was, and noisy about what counts as fast enough.
            del self.factors[rank]
            return Verdict(rank, factor, is_slow=False)
        self.factors[rank] = factor
        return Verdict(rank, factor, is_slow=True)

    def _fitted_overhead(self, before: Seen, after: Seen) -> float:
        """The k under which the slow ranks are as slow in their new shares as in the old ones."""
        moved = [
            rank
            for rank in self.factors
            if after.work[rank] and after.work[rank] < before.work[rank]
        ]
        if not moved:
            return self._overhead
        return statistics.median(_overhead_of(rank, before, after) for rank in moved)


@dataclass(frozen=True)
class Seen:
    """One step."""

    seconds: list[float]
    work: list[float]


def slowness_of(step: Seen, overhead: float) -> list[float]:
    """Of every rank in a step, where a pass costs as much as `overhead` samples beside its own."""
    costs = [s / (work + overhead) for s, work in zip(step.seconds, step.work, strict=True)]
    found = [1.0] * len(costs)
    order = sorted(range(len(costs)), key=costs.__getitem__)
    middle, is_odd = divmod(len(order) - 1, 2)
    for place, rank in enumerate(order):
        # Places of the median of the others, which have moved up behind this one.
        ends = (middle, middle) if is_odd else (middle - 1, middle)
        low, high = (costs[order[end + (end >= place)]] for end in ends)
        found[rank] = costs[rank] / ((low + high) / 2)
    return found


def _typical(steps: Sequence[Seen] | deque[Seen]) -> Seen:
    """Median times and work of every rank."""
    return Seen(
        [statistics.median(column) for column in zip(*(s.seconds for s in steps), strict=True)],
        [statistics.median(column) for column in zip(*(s.work for s in steps), strict=True)],
    )


def _overhead_of(rank: int, before: Seen, after: Seen) -> float:
    """k, by bisection: slowness after a smaller share falls in k, slowness before hardly moves."""
    low, high = 0.0, 100.0 * max(before.work)

    def excess(overhead: float) -> float:
        return slowness_of(after, overhead)[rank] / slowness_of(before, overhead)[rank] - 1

    if excess(low) <= 0 or excess(high) >= 0:
        return low if excess(low) <= 0 else high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return low
