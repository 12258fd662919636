"""KFAC under an engine that owns the loop, such as DeepSpeed or Apex (docs/examples/engine_loop.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from elastic_kfac.kfac.kfac import KFAC


class Engine(Protocol):
    """The part of an engine that is used here."""

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the last backward pass completed a step."""

    def gradient_accumulation_steps(self) -> int:
        """Backward passes per step; the engine divides each loss by it."""


class EnginePreconditioner:
    """Calls `KFAC.step()` at the engine's boundaries, on unscaled gradients.

        engine.backward(loss)
        preconditioner.step()      # does nothing inside an accumulation
        engine.step()

    Args:
        kfac: Built over the engine's module.
        engine: Where a step ends.
        loss_scale: The scale on the present gradients, which are brought to 1 before the step and to
            the scale again after it, because the engine will divide by it.
    """

    def __init__(
        self, kfac: KFAC, engine: Engine, *, loss_scale: Callable[[], float] = lambda: 1.0
    ) -> None:
        self.kfac = kfac
        self.engine = engine
        self.loss_scale = loss_scale

    def step(self) -> bool:
        """Preconditions if a step is complete; returns whether it was."""
        if not self.engine.is_gradient_accumulation_boundary():
            return False
        scale = self.loss_scale()
        layers = self.kfac.layers
        gradients = [p.grad for x in layers for p in x.parameters if p.grad is not None]
        gradients = list({id(g): g for g in gradients}.values())
        samples = self.kfac.captured_samples()
        # A mean over each micro-batch, divided by their number: one sample counts one over all.
        per_sample = scale / samples if samples else None
        if scale != 1.0:
            torch._foreach_div_(gradients, scale)
        if torch.stack([g.sum().float() for g in gradients]).sum().isfinite():
            self.kfac.step(loss_scale_per_sample=per_sample)
        else:
            self.kfac.skip_step()  # an overflow: the engine will skip this step as well
        if scale != 1.0:
            torch._foreach_mul_(gradients, scale)
        return True
