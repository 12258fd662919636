"""How the global batch and the learning rate follow the world size.

`keep_global`: neither follows; the mathematics does not know the world size. `abs`: the same; the
workers follow the batch (`batch_control`).
`keep_local`: every worker keeps its share, so the batch is proportional to the world, and the rate
follows it by the linear scaling rule (Goyal et al. 2017, section 2.1), ramped after every change
because a jump upwards is what diverges (section 2.2).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

RAMP_EPOCHS = 1.0
"""How long the rate takes from its old to its new value."""


@dataclass
class BatchPolicy:
    """Batch size and rate factor at a position; its state does not name a world size.

    `full_batch_size` is the global batch of `full_world_size` workers; a factor of 1 belongs to it.
    """

    kind: Literal["keep_global", "keep_local", "abs"]
    full_batch_size: int
    full_world_size: int
    num_samples: int
    """Of an epoch."""
    ramp_from: float = 1.0
    ramp_to: float = 1.0
    ramp_begin: int = 0
    """Samples of the run that were committed when the last ramp began."""
    begun: bool = False

    def batch_size(self, world_size: int) -> int:
        """Samples per step."""
        if self.kind != "keep_local":
            return self.full_batch_size
        return max(1, self.full_batch_size * world_size // self.full_world_size)

    def enter_world(self, world_size: int, position: int) -> None:
        """Notes the world in which the next step is taken; a change begins a ramp."""
        target = self.batch_size(world_size) / self.full_batch_size
        if not self.begun:
            self.ramp_from = self.ramp_to = target
            self.begun = True
        elif target != self.ramp_to:
            self.ramp_from = self.lr_factor(position)
            self.ramp_to = target
            self.ramp_begin = position

    def lr_factor(self, position: float) -> float:
        """What the scheduled rate is multiplied by."""
        done = (position - self.ramp_begin) / (RAMP_EPOCHS * self.num_samples)
        return self.ramp_from + (self.ramp_to - self.ramp_from) * min(max(done, 0.0), 1.0)

    def state_dict(self) -> dict[str, Any]:
        state = asdict(self)
        return {name: state[name] for name in ("ramp_from", "ramp_to", "ramp_begin", "begun")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
