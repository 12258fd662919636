"""Semantic segmentation: the class of every pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kfac.data.columns import IGNORED, Column
from elastic_kfac.tasks.language import confusion, f1_by_class
from elastic_kfac.tasks.task import Likelihood, TargetTask


class Segmentation(TargetTask):
    """Cross entropy per pixel: outputs [n, classes, H, W], targets [n, H, W], 255 where no class counts.

    `miou` is the mean over classes of TP / (TP + FP + FN), `dice` that of 2·TP / (2·TP + FP + FN), both
    over all pixels of a split and the classes that occur or are predicted; `background: false` leaves
    class 0 out of both.
    """

    metrics: ClassVar = {"miou": "max", "dice": "max", "pixel_accuracy": "max"}
    counts_terms: ClassVar = True
    has_accuracy: ClassVar = True

    def __init__(self, columns: Sequence[Column], *, background: bool = True) -> None:
        super().__init__(columns, "mask", "segmentation", "masks:DIR")
        self._background = background

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits = outputs if outputs.dtype == torch.float64 else outputs.float()
        return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)

    def terms(self, targets: Tensor) -> int:
        return int((targets != IGNORED).sum())

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(dim=1) == targets).sum()

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return confusion(outputs.argmax(dim=1), targets, outputs.shape[1]).flatten()

    def values(self, sums: Tensor, terms: int, loss: float) -> dict[str, float]:
        table = sums.view(math.isqrt(len(sums)), -1)
        dice = f1_by_class(table)[0 if self._background else 1 :]
        iou = dice / (2 - dice)
        return {
            "miou": float(iou.nanmean()) if bool((~dice.isnan()).any()) else 0.0,
            "dice": float(dice.nanmean()) if bool((~dice.isnan()).any()) else 0.0,
            "pixel_accuracy": float(table.trace() / table.sum().clamp(min=1)),
        }

    def fisher(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Likelihood]:
        return outputs.movedim(1, -1)[targets != IGNORED], "categorical"
