"""The loss around a point: along a direction, and its variance over samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic_kfac.analysis.hessian import SOLO, Batch
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.data.batch import Value, one_of
from elastic_kfac.errors import UsageError
from elastic_kfac.tasks.models import call_model, evaluating
from elastic_kfac.tasks.task import SumLoss


@torch.no_grad()
def loss_along(
    model: nn.Module,
    loss_sum: SumLoss,
    batches: Iterable[Batch],
    direction: Tensor,
    distances: Sequence[float],
    *,
    communicator: Communicator = SOLO,
    terms: Callable[[Value], int] = len,
) -> list[float]:
    """Mean loss L(θ + δv) over all samples of all ranks for each distance δ. Collective.

    The parameters are restored from a copy, so no bit of them changes.

    Args:
        direction: v [size], over all trainable parameters in order.
        distances: δ, for example symmetric around 0.
        terms: What the loss of some targets is a sum over; samples by default.
    """
    chosen = [p for p in model.parameters() if p.requires_grad]
    sizes = [p.numel() for p in chosen]
    if sum(sizes) != direction.numel():
        raise UsageError(
            "the direction does not fit the parameters",
            given=f"{direction.numel()} elements",
            allowed=sum(sizes),
        )
    parts = [v.view(p.shape) for v, p in zip(direction.split(sizes), chosen, strict=True)]
    originals = [p.detach().clone() for p in chosen]
    totals = torch.zeros(len(distances) + 1, dtype=torch.float64, device=direction.device)
    try:
        with evaluating(model):
            for index, distance in enumerate(distances):
                for parameter, original, part in zip(chosen, originals, parts, strict=True):
                    parameter.copy_(original + distance * part.to(original.dtype))
                for inputs, labels in batches:
                    if len(labels):
                        totals[index] += loss_sum(call_model(model, inputs), labels)
                        totals[-1] += terms(labels) if index == 0 else 0
    finally:
        for parameter, original in zip(chosen, originals, strict=True):
            parameter.copy_(original)
    communicator.all_reduce(totals, tag="hessian")
    if not float(totals[-1]):
        raise UsageError("the loss along a direction has no samples on any rank")
    return (totals[:-1] / totals[-1]).tolist()


@dataclass(frozen=True)
class BiasVariance:
    """Mean and variance of single samples' losses."""

    mean: float
    variance: float
    """Over samples, divided by n − 1."""
    count: int

    def bound(self, factor: float = 1.0) -> float:
        """Mean + C·√(Var f / n): a diagnostic estimate of the loss on new samples."""
        return self.mean + factor * math.sqrt(self.variance / self.count)


@torch.no_grad()
def bias_variance(
    model: nn.Module,
    loss_sum: SumLoss,
    batches: Iterable[Batch],
    *,
    communicator: Communicator = SOLO,
) -> BiasVariance:
    """Mean and variance of single samples' losses over all ranks. Collective."""
    losses: list[Tensor] = []
    with evaluating(model):
        for inputs, labels in batches:
            if len(labels):
                outputs = call_model(model, inputs)
                losses += [
                    loss_sum(one_of(outputs, i, len(labels)), labels[i : i + 1])
                    .double()
                    .reshape(())
                    for i in range(len(labels))
                ]
    device = next(model.parameters()).device
    values = torch.stack(losses) if losses else torch.zeros(0, dtype=torch.float64, device=device)
    totals = torch.stack((values.sum(), values.new_tensor(float(len(losses)))))
    communicator.all_reduce(totals, tag="hessian")
    total, count = totals.tolist()
    if count < 2:
        raise UsageError("a variance needs at least two samples", given=int(count))
    mean = total / count
    # Summed around the mean: the difference of two large moments would lose digits.
    spread = (values - mean).square().sum().reshape(1)
    communicator.all_reduce(spread, tag="hessian")
    return BiasVariance(mean, float(spread) / (count - 1), int(count))
