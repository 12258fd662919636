"""Losses and accuracy.

A loss is a SUM over samples. The loop divides by the global batch size before the backward pass, so
that gradients summed over micro-batches and ranks are the gradient of the global mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kfac.config import TrainConfig
from elastic_kfac.errors import ConfigError
from elastic_kfac.tasks.imports import is_reference, load_reference

SumLoss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, labels) to the SUM of the samples' losses."""


class Task(Protocol):
    """A loss and its accuracy; user tasks implement it, and their factory gets the `train` section.

    Labels are classes [batch], or probabilities [batch, classes] under mixup.
    """

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The summed loss of a batch, a scalar."""
        ...

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The number of correct samples, a scalar."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Classification: outputs [batch, classes]."""

    label_smoothing: float = 0.0

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        # Half-precision logits lose the small differences between confident predictions.
        logits = outputs if outputs.dtype == torch.float64 else outputs.float()
        if labels.dim() == 2:
            labels = labels.to(logits.dtype)
        return F.cross_entropy(
            logits, labels, reduction="sum", label_smoothing=self.label_smoothing
        )

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return _right(outputs, labels)


@dataclass(frozen=True)
class MeanSquaredError:
    """Half the squared distance to the one-hot label: outputs [batch, classes], labels [batch]."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        targets = labels if labels.dim() == 2 else F.one_hot(labels, outputs.shape[1])
        targets = targets.to(outputs.dtype)
        return 0.5 * (outputs - targets).square().sum()

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return _right(outputs, labels)


def _right(outputs: Tensor, labels: Tensor) -> Tensor:
    # The class of a probability vector is its largest entry.
    classes = labels.argmax(dim=1) if labels.dim() == 2 else labels
    return (outputs.argmax(dim=1) == classes).sum()


def make_task(train: TrainConfig) -> Task:
    """The task of `train.loss`.

    Raises:
        ConfigError: If the name is unknown, or a user task lacks `loss` or `correct`.
    """
    if is_reference(train.loss):
        task = load_reference(train.loss, key="train.loss")(train)
        for method in ("loss", "correct"):
            if not callable(getattr(task, method, None)):
                raise ConfigError(
                    f"train.loss: the task has no method {method}(outputs, labels)",
                    given=train.loss,
                )
        return task
    if train.loss == "cross_entropy":
        return CrossEntropy(train.label_smoothing)
    if train.loss == "mse":
        return MeanSquaredError()
    raise ConfigError(
        "unknown train.loss",
        given=train.loss,
        allowed="cross_entropy, mse, or package.module:factory",
    )
