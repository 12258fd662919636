"""Regression and autoencoding: squared errors of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from elastic_kfac.data.batch import Batch
from elastic_kfac.data.columns import Column
from elastic_kfac.errors import ConfigError
from elastic_kfac.tasks.task import Likelihood, TargetTask, Task


class Regression(TargetTask):
    """Half the squared error of one tensor of numbers: outputs in the shape of the targets.

    The model predicts standardised targets, (y - mean) / std of the training split, so that learning
    rate and damping do not depend on units; metrics are in the units of the data.
    """

    metrics: ClassVar = {"rmse": "min", "mae": "min", "r2": "max"}

    def __init__(self, columns: Sequence[Column], *, standardise: bool = True) -> None:
        super().__init__(columns, "tensor", "regression", "table:PATH?targets=NAME")
        target = self.target
        self._mean = torch.tensor(
            target.mean if standardise and target.mean else (0.0,), dtype=torch.float64
        )
        std = target.std if standardise and target.std else (1.0,)
        self._std = torch.tensor([value or 1.0 for value in std], dtype=torch.float64)

    def _standardised(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape != targets.shape:
            outputs = outputs.reshape(targets.shape)
        wanted = (targets.double() - self._mean.to(targets.device)) / self._std.to(targets.device)
        return outputs - wanted.to(outputs.dtype)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * self._standardised(outputs, targets).square().sum()

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        errors = self._standardised(outputs.detach(), targets).double()
        errors = errors * self._std.to(errors.device)
        centred = targets.double() - self._mean.to(targets.device)
        parts = (errors.square(), errors.abs(), centred, centred.square())
        count = torch.tensor(float(errors.numel()), dtype=torch.float64, device=errors.device)
        return torch.stack([*(part.sum() for part in parts), count])

    def values(self, sums: Tensor, terms: int, loss: float) -> dict[str, float]:
        squared, absolute, centred, centred_squared, count = sums.tolist()
        spread = centred_squared - centred**2 / count
        return {
            "rmse": math.sqrt(squared / count),
            "mae": absolute / count,
            "r2": 1 - squared / spread if spread > 0 else 0.0,
        }

    def fisher(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Likelihood]:
        return outputs, "gaussian"


class Autoencoding(Task):
    """The input is the target: outputs in the shape of the only input.

    `loss` is `mse`, half the squared error of the normalised input, or `bce`, the binary cross entropy
    of inputs scaled to 0..1, whose outputs are logits.
    """

    metrics: ClassVar = {"mse": "min"}

    def __init__(self, columns: Sequence[Column], *, loss: Literal["mse", "bce"] = "mse") -> None:
        inputs = [column for column in columns if column.role == "input"]
        if len(inputs) != 1 or inputs[0].kind not in ("image", "tensor"):
            raise ConfigError(
                "task.name=autoencoding needs one input, an image or a tensor",
                given=", ".join(f"{c.name} ({c.kind})" for c in inputs),
            )
        if loss not in ("mse", "bce"):
            raise ConfigError("unknown task.arguments.loss", given=loss, allowed="mse, bce")
        if loss == "bce" and inputs[0].kind != "image":
            raise ConfigError("task.arguments.loss=bce needs images", given=inputs[0].kind)
        self._kind = loss
        self._mean, self._std = inputs[0].mean, tuple(std or 1.0 for std in inputs[0].std)

    def prepare(self, batch: Batch, seed: int, epoch: int) -> Batch:
        return replace(batch, targets=batch.inputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = outputs.reshape(targets.shape)
        if self._kind == "mse":
            return 0.5 * (outputs - targets).square().sum()
        return binary_cross_entropy_with_logits(
            outputs, self._shares(targets).to(outputs.dtype), reduction="sum"
        )

    def _shares(self, targets: Tensor) -> Tensor:
        """Pixels from 0 to 1 again."""
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (self._mean, self._std))
        shape = (1, -1, 1, 1)
        pixels = targets.double() * std.view(shape).to(targets.device)
        return (pixels + mean.view(shape).to(targets.device)).clamp(0, 1)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, wanted = outputs.detach().reshape(targets.shape).double(), targets.double()
        if self._kind == "bce":
            outputs, wanted = outputs.sigmoid(), self._shares(targets)
        count = torch.tensor(float(wanted.numel()), dtype=torch.float64, device=wanted.device)
        return torch.stack([(outputs - wanted).square().sum(), count])

    def values(self, sums: Tensor, terms: int, loss: float) -> dict[str, float]:
        return {"mse": float(sums[0] / sums[1])}

    def fisher(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Likelihood]:
        return outputs, "gaussian"
