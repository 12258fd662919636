"""Learning-rate schedules as pure functions of the position in the run.

The position is a fractional epoch (samples seen / samples per epoch), never a step of some world
size, so that a resize or another batch size cannot shift a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from elastic_kfac.errors import ConfigError

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


def polynomial_decay(start_epoch: float, end_epoch: float, power: float) -> Schedule:
    """1 before `start_epoch`, then (1 − (e − start)/(end − start))^p, and 0 from `end_epoch` on.

    `end_epoch` may lie after the end of training, which then stops at a rate that is not 0.

    Raises:
        ConfigError: If the decay ends before it starts, or the power is not positive.
    """
    if not 0 <= start_epoch < end_epoch or not power > 0:
        raise ConfigError(
            "polynomial decay out of range",
            given=f"epochs {start_epoch} to {end_epoch}, power {power}",
            allowed="0 <= start < end, power > 0",
        )

    def factor(epoch: float) -> float:
        if epoch < start_epoch:
            return 1.0
        if epoch >= end_epoch:
            return 0.0
        return (1 - (epoch - start_epoch) / (end_epoch - start_epoch)) ** power

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
    start_epoch: float = 0.0,
    end_epoch: float | None = None,
    power: float = 2.0,
) -> Schedule:
    """The schedule of a name, with warm-up.

    `constant`, `step` (decay epochs and factor), `cosine` and `linear` (end fraction) or `polynomial`
    (start and end epoch, power; None ends it with the run).

    Raises:
        ValueError: If the name is unknown.
        ConfigError: If a polynomial decay is out of range.
    """
    if name == "constant":
        schedule = constant()
    elif name == "step":
        schedule = step_decay(decay_epochs, decay_factor)
    elif name == "cosine":
        schedule = cosine(total_epochs, end_fraction)
    elif name == "linear":
        schedule = linear(total_epochs, end_fraction)
    elif name == "polynomial":
        end = total_epochs if end_epoch is None else end_epoch
        schedule = polynomial_decay(start_epoch, end, power)
    else:
        raise ValueError(
            f"unknown lr_schedule {name!r}: constant, step, cosine, linear or polynomial"
        )
    return with_warmup(schedule, warmup_epochs)
