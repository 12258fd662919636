"""A rank that is throttled: its passes take `FACTOR` times as long per sample, on a clock or asleep."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor, nn

from support.training_problems import float64_cnn

FACTOR = 1.0
"""Of this process."""
SLEEP_S = 0.0
"""Per sample of a rank that is not throttled."""


class Clock:
    """Stands in for the module `time`: passes alone take time, 1 ms per sample."""

    now = 0.0

    @classmethod
    def perf_counter(cls) -> float:
        return cls.now


class _Throttled(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            Clock.now += 1e-3 * FACTOR * len(inputs)
            time.sleep(SLEEP_S * FACTOR * len(inputs))
        return inputs


def throttled_cnn(num_classes: int, image_shape: tuple[int, int, int], **_: Any) -> nn.Module:
    """`float64_cnn` on such a rank."""
    return nn.Sequential(_Throttled(), float64_cnn(num_classes, image_shape))
