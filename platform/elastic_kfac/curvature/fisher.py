"""Losses whose gradients have the model's own Fisher as their second moment (Martens and Grosse 2015)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fisher_losses(
    output: Tensor,
    kind: str,
    likelihood: str,
    draws: int,
    generator: torch.Generator | None,
) -> list[tuple[Tensor, float]]:
    """Sum losses and weights: squared per-sample gradients, so weighted, add up to the Fisher.

    Args:
        output: Logits `[n, classes, ...]`, or means `[n, ...]` of a unit-variance Gaussian.
        kind: `1mc` and `mc` draw labels; `exact` loops over all of them.
        likelihood: `categorical` or `gaussian`.
        draws: Labels per sample.
        generator: Source of the labels.
    """
    with torch.enable_grad():
        if likelihood == "gaussian":
            if kind == "exact":
                return [(part.sum(), 1.0) for part in output.flatten(1).unbind(1)]
            noises = (
                torch.randn(
                    output.shape, dtype=output.dtype, device=output.device, generator=generator
                )
                for _ in range(draws)
            )
            return [((output * noise).sum(), 1.0 / draws) for noise in noises]
        log_p = F.log_softmax(output, 1)
        classes = output.shape[1]
        rows = log_p.movedim(1, -1).reshape(-1, classes)
        if kind == "exact":
            roots = rows.detach().mul(0.5).exp()
            return [((roots[:, c] * rows[:, c]).sum(), 1.0) for c in range(classes)]
        losses = []
        for _ in range(draws):
            labels = torch.multinomial(rows.detach().exp(), 1, generator=generator)
            losses.append((-rows.gather(1, labels).sum(), 1.0 / draws))
        return losses
