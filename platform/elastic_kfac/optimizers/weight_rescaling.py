"""Weight rescaling after an update, which replaces weight decay in the large-batch K-FAC recipe."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from elastic_kfac.errors import ConfigError

Rule = Literal["shrink", "always"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class WeightRescaling:
    """W ← W·√(2·d_out) / (‖W‖_F + 1e-9) for every convolution and linear layer (Osawa et al. 2019).

    The output of a layer followed by normalisation does not depend on the scale of its weight, but its
    effective rate falls as the weight grows. Normalisation layers and biases are left alone; a shared
    weight is rescaled once.

    Args:
        model: Its weights are rescaled.
        rule: `shrink` rescales only where that makes the weight smaller, as the released code does;
            `always` as the paper writes.

    Raises:
        ConfigError: If the rule is unknown.
    """

    def __init__(self, model: nn.Module, rule: Rule = "shrink") -> None:
        if rule not in ("shrink", "always"):
            raise ConfigError("unknown weight rescaling", given=rule, allowed="shrink, always")
        self.rule = rule
        layers = [module for module in model.modules() if isinstance(module, _LAYERS)]
        self._weights = list(dict.fromkeys(layer.weight for layer in layers))

    @torch.no_grad()
    def apply(self) -> None:
        """Rescales every weight; call after `optimizer.step()`."""
        if not self._weights:
            return
        norms = torch._foreach_norm(self._weights)
        scales: list[Tensor] = []
        for weight, norm in zip(self._weights, norms, strict=True):
            scale = math.sqrt(2 * weight.shape[0]) / (norm + 1e-9)
            scales.append(scale.clamp(max=1.0) if self.rule == "shrink" else scale)
        torch._foreach_mul_(self._weights, scales)
