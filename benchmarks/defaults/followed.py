"""Damping that follows the output gradient in other ways than the product does, for `candidates.yaml`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elastic_kfac import KFAC


def _with(rule: Callable[[float], float]) -> Callable[..., KFAC]:
    """KFAC whose damping is multiplied by a function of the relative mean square of the gradients."""

    def build(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> KFAC:
        kfac = KFAC(model, lr=optimizer, **options)
        trust, squares = kfac.bound.trust, [1.0]
        assert trust is not None

        def follow(square: Tensor) -> None:
            trust.residual = rule(squares.pop())
            squares.append(float(square) or 1.0)

        trust.follow = follow  # type: ignore[method-assign]
        return kfac

    return build


constant = _with(lambda square: 1.0)
mean_square = _with(lambda square: min(max(square, 1e-3), 1.0))
root_mean_square = _with(lambda square: min(max(square, 1e-6), 1.0) ** 0.5)
