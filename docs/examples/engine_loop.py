"""K-FAC under an engine that owns backward, accumulation and the optimizer (DeepSpeed, Apex).

    python docs/examples/engine_loop.py

`SmallEngine` stands in for `deepspeed.initialize(...)`; `EnginePreconditioner` uses nothing else of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC, EnginePreconditioner

LOSS_SCALE = 256.0


class SmallEngine:
    """Scales losses, accumulates two micro-batches per step, and skips what has overflowed."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.module = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.7)
        self._backwards = 0

    def gradient_accumulation_steps(self) -> int:
        return 2

    def is_gradient_accumulation_boundary(self) -> bool:
        return self._backwards % 2 == 0

    def backward(self, loss: Tensor) -> None:
        (loss * LOSS_SCALE / 2).backward()
        self._backwards += 1

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            for parameter in self.module.parameters():
                assert parameter.grad is not None
                parameter.grad.div_(LOSS_SCALE)
            self.optimizer.step()
            self.optimizer.zero_grad()


def train(steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    inputs = torch.randn(64, 10)
    labels = (inputs @ torch.randn(10, 3)).argmax(1)
    engine = SmallEngine(nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3)), lr=0.1)
    kfac = KFAC(engine.module, lr=engine.optimizer, damping=0.01)
    preconditioner = EnginePreconditioner(kfac, engine, loss_scale=lambda: LOSS_SCALE)
    losses = []
    for _ in range(steps):
        for half in (slice(0, 32), slice(32, 64)):
            loss = F.cross_entropy(engine.module(inputs[half]), labels[half])
            engine.backward(loss)
            preconditioner.step()
            engine.step()
        losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    print("loss:", " ".join(f"{loss:.3f}" for loss in train()))
