"""Classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kfac.config import TrainConfig
from elastic_kfac.data.batch import Batch, Fields, outputs_for
from elastic_kfac.data.columns import Column
from elastic_kfac.errors import ConfigError
from elastic_kfac.tasks.imports import is_reference, load_reference, made_by
from elastic_kfac.tasks.task import Task


@dataclass(frozen=True)
class Classification(Task):
    """Outputs [batch, classes]; targets are classes [batch], or probabilities [batch, classes] under
    mixup."""

    metrics: ClassVar = {"accuracy": "max"}
    has_accuracy: ClassVar = True

    target: Column | None = field(default=None, kw_only=True)
    """The column with the classes, where a set has several targets."""

    def num_outputs(self, columns: Sequence[Column]) -> int:
        return outputs_for(columns if self.target is None else (self.target,))

    def prepare(self, batch: Batch, seed: int, epoch: int) -> Batch:
        if self.target is not None and isinstance(batch.targets, Fields):
            return replace(batch, targets=batch.targets[self.target.name])
        return batch

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # The class of a probability vector is its largest entry.
        classes = targets.argmax(dim=1) if targets.dim() == 2 else targets
        return (outputs.argmax(dim=1) == classes).sum()

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.correct(outputs, targets).double().view(1)

    def values(self, sums: Tensor, terms: int, loss: float) -> dict[str, float]:
        return {"accuracy": round(float(sums[0])) / terms}


@dataclass(frozen=True)
class CrossEntropy(Classification):
    """Classification by cross entropy."""

    label_smoothing: float = 0.0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # Half-precision logits lose the small differences between confident predictions.
        logits = outputs if outputs.dtype == torch.float64 else outputs.float()
        if targets.dim() == 2:
            targets = targets.to(logits.dtype)
        return F.cross_entropy(
            logits, targets, reduction="sum", label_smoothing=self.label_smoothing
        )


@dataclass(frozen=True)
class MeanSquaredError(Classification):
    """Classification by half the squared distance to the one-hot label."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        wanted = targets if targets.dim() == 2 else F.one_hot(targets, outputs.shape[1])
        return 0.5 * (outputs - wanted.to(outputs.dtype)).square().sum()

    def fisher(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Literal["gaussian"]]:
        return outputs, "gaussian"


@dataclass(frozen=True)
class OwnLoss(Classification):
    """Classification by a person's object with the methods `loss` and `correct`."""

    own: Any

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.own.loss(outputs, targets)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.own.correct(outputs, targets)


def classification(train: TrainConfig, columns: Sequence[Column]) -> Task:
    """The task of `train.loss`.

    Raises:
        ConfigError: If the set has no classes, the name is unknown, or a person's object lacks `loss` or
            `correct`.
    """
    classes = [column for column in columns if column.kind == "class" and column.role == "target"]
    if columns and not classes:
        raise ConfigError(
            "task.name=classification needs a target with classes",
            given=", ".join(f"{c.name} ({c.role}: {c.kind})" for c in columns),
            change="set task.name to what these samples are for",
        )
    target = classes[0] if classes else None
    if is_reference(train.loss):
        factory = load_reference(train.loss, key="train.loss")
        own = made_by(factory, train, key="train.loss", given=train.loss)
        for method in ("loss", "correct"):
            if not callable(getattr(own, method, None)):
                raise ConfigError(
                    f"train.loss: the task has no method {method}(outputs, labels)",
                    given=train.loss,
                )
        return OwnLoss(own, target=target)
    if train.loss == "cross_entropy":
        return CrossEntropy(train.label_smoothing, target=target)
    if train.loss == "mse":
        return MeanSquaredError(target=target)
    raise ConfigError(
        "unknown train.loss",
        given=train.loss,
        allowed="cross_entropy, mse, or package.module:factory",
    )
