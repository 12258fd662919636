"""Mixed precision: autocast for the passes, and a loss scaler whose state is plain numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """The context of forward passes and loss."""
    if precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


@dataclass
class LossScaler:
    """Dynamic loss scale (Micikevicius et al. 2018): halve on overflow, double after a good while.

    Every rank sees the same reduced gradients, so all of them decide alike without a message.
    """

    scale: float = 1.0
    good_steps: int = 0
    growth_interval: int = 2000
    largest: float = 2.0**24

    @classmethod
    def for_precision(cls, precision: Precision) -> LossScaler:
        """fp16 starts at 2**16; the others need no scale."""
        return cls(scale=2.0**16) if precision == "fp16" else cls(growth_interval=0)

    @property
    def enabled(self) -> bool:
        return self.growth_interval > 0

    def update(self, *, overflow: bool) -> None:
        """Moves the scale after a step."""
        if not self.enabled:
            return
        if overflow:
            self.scale = max(self.scale / 2, 1.0)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.scale = min(self.scale * 2, self.largest)
            self.good_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
