"""How often a statistic is refreshed: fixed intervals, or intervals that follow how much it changes.

The adaptive rule is SP-NGD's (Osawa et al. 2020), per statistic: an interval grows like the Fibonacci
numbers while the statistic stays what it was, and halves when it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


def next_interval(
    similar_to_last: bool, similar_to_one_before: bool, interval: int, interval_before: int
) -> int:
    """Δ from Δ₋₁ and Δ₋₂ and whether the statistic resembles its last two snapshots."""
    if not similar_to_last:
        return max(1, interval // 2)
    if not similar_to_one_before:
        return interval
    return interval + interval_before


def is_similar(new: Tensor, old: Tensor, threshold: float) -> Tensor:
    """`‖X − Y‖_F < α ‖Y‖_F` as a boolean scalar tensor."""
    return (new - old).norm() < threshold * old.norm()


@dataclass(frozen=True)
class RefreshClock:
    """When one statistic is due; the same on every rank."""

    next_step: int = 0
    interval: int = 1
    interval_before: int = 1
    refreshes: int = 0

    def due(self, step: int) -> bool:
        """Whether the statistic is refreshed in this step."""
        return step >= self.next_step

    def advanced(self, step: int, interval: int) -> RefreshClock:
        """After a refresh in `step` that chose `interval`."""
        return replace(
            self,
            next_step=step + interval,
            interval=interval,
            interval_before=self.interval,
            refreshes=self.refreshes + 1,
        )

    def state_dict(self) -> dict[str, int]:
        """Plain numbers."""
        return dict(vars(self))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RefreshClock:
        """The clock that `state_dict` wrote."""
        return cls(**{name: int(value) for name, value in state.items()})


class Snapshots:
    """The last two snapshots of one statistic; kept by its owner only."""

    def __init__(self, tensors: tuple[Tensor, ...] = ()) -> None:
        self.tensors = tensors

    def choose_interval(self, new: Tensor, clock: RefreshClock, threshold: float) -> int:
        """Δ for the refresh that brought `new`; remembers `new`."""
        known = self.tensors
        self.tensors = (new.clone(), *known[:1])
        if not known:
            return 1
        similar = [bool(is_similar(new, old, threshold)) for old in known]
        if len(known) == 1:
            return clock.interval if similar[0] else max(1, clock.interval // 2)
        return next_interval(similar[0], similar[1], clock.interval, clock.interval_before)
