"""Arithmetic of single numbers: on the host where it can read them, else on the device.

A rule is written once. Where tensors are in the memory of the host its numbers are Python floats, which
cost a thirtieth of a tensor's; on a device they are float64 scalars, and the host waits for none. Both
give the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elastic_kfac.curvature import factors

Number = float | Tensor


def numbers(values: Tensor) -> list[Number]:
    """The entries of a float64 `[n]`."""
    return values.tolist() if factors.can_be_read(values) else [*values.unbind()]


def where(condition: bool | Tensor, value: Number, other: Number) -> Number:
    """As `torch.where`."""
    if not isinstance(condition, Tensor):
        return value if condition else other
    return torch.where(condition, value, other)


def divided(value: Number, by: Number) -> Number:
    """The quotient; by zero, too."""
    if isinstance(value, Tensor) or isinstance(by, Tensor) or by:
        return value / by
    return math.nan if not value or math.isnan(value) else math.copysign(math.inf, value)


def root(value: Number) -> Number:
    """The square root; NaN of a negative number."""
    if isinstance(value, Tensor):
        return value.sqrt()
    return math.sqrt(value) if value >= 0.0 else math.nan


def within(value: Number, low: float, high: float) -> Number:
    """The nearest number between two."""
    return value.clamp(low, high) if isinstance(value, Tensor) else min(max(value, low), high)


def or_zero(value: Number) -> Number:
    """0 where it is not finite."""
    if isinstance(value, Tensor):
        return value.nan_to_num(0.0, 0.0, 0.0)
    return value if math.isfinite(value) else 0.0


def counted(condition: bool | Tensor) -> Number:
    """1 if it holds, else 0."""
    return condition.double() if isinstance(condition, Tensor) else float(condition)


def cast(value: Number, dtype: torch.dtype) -> Number:
    """The number as a factor of tensors of a dtype."""
    return value.to(dtype) if isinstance(value, Tensor) else value


def exponential(value: Number) -> Number:
    """e to the power of a number."""
    if isinstance(value, Tensor):
        return value.exp()
    return float(torch.tensor(value, dtype=torch.float64).exp()) if value else 1.0
