"""Which trials can no longer be worth their time: all that they can still end with is known from below.

What a trial has spent without reaching the target, it has spent in any case. A finished trial that took
no more than that of anything the report weighs beats it, whatever its other steps bring: the winner and
the fronts of best trade-offs are the same without it. How many steps a trajectory needs is not guessed
from others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NOISE = 0.01
"""Share of a measured memory that differs between equal trainings."""


@dataclass(frozen=True)
class Costs:
    """What a trial took to the target, or takes at least."""

    objective: float
    memory_bytes: float | None = None
    """Of the largest worker; None where it is not known."""
    worker_seconds: float | None = None
    """Of all workers together; None where it is not known."""


def beaten_by(least: Costs, finished: Mapping[str, Costs], noise: float = 0.0) -> str | None:
    """The fastest of the finished trials that a trial cannot beat in any cost; None if it still can.

    Args:
        least: Of the trial. A cost that is not known is not weighed: no front can show it.
        finished: Those that reached the target.
        noise: Share by which memory may differ and still be the same.
    """

    def is_no_worse(other: float | None, bound: float | None) -> bool:
        return bound is None or (other is not None and other <= bound)

    beating = [
        name
        for name, other in finished.items()
        if other.objective <= least.objective
        and is_no_worse(
            other.memory_bytes,
            None if least.memory_bytes is None else least.memory_bytes * (1.0 + noise),
        )
        and is_no_worse(other.worker_seconds, least.worker_seconds)
    ]
    return min(beating, key=lambda name: finished[name].objective, default=None)
