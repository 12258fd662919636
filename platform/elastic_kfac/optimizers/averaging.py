"""A moving average of the weights (Polyak and Juditsky 1992), beside those that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of the parameters, e ← d·e + (1 − d)·w after every update.

    It begins with the weights that the model has now. Buffers are not averaged: whoever uses the average
    takes the model's own running statistics. Ranks with equal weights have equal averages.

    Args:
        model: Whose parameters are averaged.
        decay: d, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._decay = decay
        self._weights: dict[str, Tensor] = {}
        self.load_state_dict({})

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the present weights."""
        for name, parameter in self._model.named_parameters():
            self._weights[name].lerp_(parameter, 1 - self._decay)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Puts the average into the model; its own weights are back on exit, bit for bit."""
        own = {name: p.detach().clone() for name, p in self._model.named_parameters()}
        _write(self._model, self._weights)
        try:
            yield
        finally:
            _write(self._model, own)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._weights)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues an average; an empty state begins one."""
        self._weights = {
            name: state.get(name, parameter).detach().to(parameter, copy=True)
            for name, parameter in self._model.named_parameters()
        }


@torch.no_grad()
def _write(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
