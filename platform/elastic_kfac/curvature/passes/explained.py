"""Whether the passes that were recorded explain the gradient of a layer: does it compute W x + b?"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

CHECK_TRIES = 10
"""A layer that starts at 0 may have no gradient for some steps."""

CHECK_TOLERANCE = 0.05
"""Sound layers differ by rounding: up to 0.004 under bf16 autocast. Faults begin at 0.4."""


def unexplained(parameter: Tensor, parts: Iterable[tuple[slice | None, Tensor]]) -> float:
    """The part of `.grad` that the sum of `parts` does not explain, relative to it.

    Args:
        parameter: With a gradient.
        parts: What every call adds to the gradient, or to these rows of it; one that raises RuntimeError
            has shapes of another computation.
    """
    assert parameter.grad is not None
    gradient = parameter.grad.detach()
    explained = torch.zeros_like(gradient)
    try:
        for rows, part in parts:
            target = explained if rows is None else explained[rows]
            target += part.to(target.dtype).reshape(target.shape)
    except RuntimeError:
        explained.zero_()
    rest = explained - gradient
    if parameter.numel() >= 8:
        # A penalty on the weight itself adds a multiple of it: the passes are those of the layer.
        along = parameter.detach() / parameter.norm()
        rest = torch.where(along.isfinite().all(), rest - along * (along * rest).sum(), rest)
    return float(rest.norm() / gradient.norm())


def doubt(difference: float) -> str:
    """Why a layer with this `unexplained` part cannot be covered; empty if it can."""
    if not CHECK_TOLERANCE < difference < math.inf:
        return ""
    return (
        "its gradient is not that of W x + b with the inputs it was called with "
        f"(relative difference {difference:.2g})"
    )
