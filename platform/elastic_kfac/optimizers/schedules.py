"""Learning-rate schedules as pure functions of the position in the run.

The position is a fractional epoch (samples seen / samples per epoch), never a step of some world
size, so that a resize or another batch size cannot shift a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[float], float]
"""Maps a fractional epoch to a factor of the base learning rate."""


def constant() -> Schedule:
    """The base rate throughout."""
    return lambda epoch: 1.0


def step_decay(decay_epochs: Sequence[float], factor: float) -> Schedule:
    """Multiplies by `factor` at each of `decay_epochs`."""
    milestones = tuple(decay_epochs)
    return lambda epoch: float(factor) ** sum(epoch >= milestone for milestone in milestones)


def cosine(total_epochs: float, end_fraction: float = 0.0) -> Schedule:
    """Half a cosine from 1 to `end_fraction` (Loshchilov and Hutter 2017, equation 5)."""

    def factor(epoch: float) -> float:
        progress = min(max(epoch / total_epochs, 0.0), 1.0)
        return end_fraction + (1 - end_fraction) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def linear(total_epochs: float, end_fraction: float = 0.0) -> Schedule:
    """A straight line from 1 to `end_fraction`."""

    def factor(epoch: float) -> float:
        progress = min(max(epoch / total_epochs, 0.0), 1.0)
        return 1 - (1 - end_fraction) * progress

    return factor


def with_warmup(schedule: Schedule, warmup_epochs: float) -> Schedule:
    """Ramps linearly to the schedule's value at the end of the warm-up (Goyal et al. 2017).

    The schedule itself is not shifted: its decay epochs stay where the person wrote them. At epoch
    0 the factor is 0, so a caller passes the position at the end of the step.
    """
    if warmup_epochs <= 0:
        return schedule

    def factor(epoch: float) -> float:
        if epoch >= warmup_epochs:
            return schedule(epoch)
        return schedule(warmup_epochs) * epoch / warmup_epochs

    return factor


def make_schedule(
    name: str,
    *,
    total_epochs: float,
    warmup_epochs: float = 0.0,
    decay_epochs: Sequence[float] = (),
    decay_factor: float = 0.1,
    end_fraction: float = 0.0,
) -> Schedule:
    """The schedule of a configuration: `constant`, `step`, `cosine` or `linear`, with warm-up.

    Raises:
        ValueError: If the name is unknown.
    """
    if name == "constant":
        schedule = constant()
    elif name == "step":
        schedule = step_decay(decay_epochs, decay_factor)
    elif name == "cosine":
        schedule = cosine(total_epochs, end_fraction)
    elif name == "linear":
        schedule = linear(total_epochs, end_fraction)
    else:
        raise ValueError(f"unknown lr_schedule {name!r}: constant, step, cosine or linear")
    return with_warmup(schedule, warmup_epochs)
