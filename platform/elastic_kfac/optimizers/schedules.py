"""Learning-rate schedules as pure functions of the position in a run; momentum that follows the rate.

The position is a fractional epoch (samples seen / samples per epoch), never a step, so that neither a
resize nor another batch size shifts a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from elastic_kfac.errors import ConfigError

Schedule = Callable[[float], float]
"""Maps a fractional epoch to a factor of the base learning rate."""
MomentumRule = Literal["ratio0", "ratio_prev"]


def step_decay(decay_epochs: Sequence[float], factor: float) -> Schedule:
    """Multiplies by `factor` at each of `decay_epochs`."""
    milestones = tuple(decay_epochs)
    return lambda epoch: float(factor) ** sum(epoch >= milestone for milestone in milestones)


def cosine(total_epochs: float, end_fraction: float = 0.0) -> Schedule:
    """Half a cosine from 1 to `end_fraction` (Loshchilov and Hutter 2017, equation 5)."""
    return lambda epoch: (
        end_fraction
        + (1 - end_fraction) * 0.5 * (1 + math.cos(math.pi * _progress(epoch, total_epochs)))
    )


def linear(total_epochs: float, end_fraction: float = 0.0) -> Schedule:
    """A straight line from 1 to `end_fraction`."""
    return lambda epoch: 1 - (1 - end_fraction) * _progress(epoch, total_epochs)


def _progress(epoch: float, total_epochs: float) -> float:
    return min(max(epoch / total_epochs, 0.0), 1.0)


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

    The schedule is not shifted: its decay epochs keep their meaning. At epoch 0 the factor is 0, so
    callers pass the position at the end of a step.
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
        schedule: Schedule = lambda epoch: 1.0  # noqa: E731
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


def tied_momentum(
    rule: MomentumRule, base_momentum: float, *, lr: float, base_lr: float, previous_lr: float
) -> float:
    """The momentum of a step, for a velocity that contains the rate (`VelocitySGD`).

    `ratio0` is the paper's m0·lr/lr0; `ratio_prev` the released code's m0·lr/lr_prev while the rate
    falls, which equals `torch.optim.SGD` with a constant m0.

    Raises:
        ConfigError: If the rule is unknown.
    """
    if rule == "ratio0":
        return base_momentum * lr / base_lr
    if rule == "ratio_prev":
        falls = previous_lr > 0 and lr < previous_lr
        return base_momentum * lr / previous_lr if falls else base_momentum
    raise ConfigError("unknown momentum rule", given=rule, allowed="ratio0, ratio_prev")
