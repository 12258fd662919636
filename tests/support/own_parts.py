"""Models and losses as users bring them, right and wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class FailsInTraining(nn.Module):
    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise ZeroDivisionError("on purpose")
        return self.layer(images.flatten(1))


class TooNarrow(FailsInTraining):
    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(num_classes, image_shape)
        self.layer = nn.Linear(63, num_classes)


class SumLoss:
    reduction = "sum"

    def __init__(self, train: Any) -> None:
        pass

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, labels, reduction=self.reduction)

    def correct(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (outputs.argmax(1) == labels).sum()


class MeanLoss(SumLoss):
    reduction = "mean"
