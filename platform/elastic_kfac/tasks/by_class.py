"""The numbers of every class in an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from elastic_kfac.data.batch import Value
from elastic_kfac.data.columns import Column
from elastic_kfac.errors import UsageError
from elastic_kfac.tasks.language import SequenceClassification, confusion
from elastic_kfac.tasks.losses import Classification
from elastic_kfac.tasks.segmentation import Segmentation
from elastic_kfac.tasks.task import Task


@dataclass(frozen=True)
class ClassResult:
    """What became of a class over a split, in samples or pixels; 0/0 is None."""

    name: str
    count: int
    """That belong to it."""
    precision: float | None
    """Right ones among those predicted as it."""
    recall: float | None
    """Right ones among those that belong to it; for samples, its accuracy."""
    f1: float | None


class ByClass(Task):
    """A task that also counts by class; its metrics are those of `task`.

    Raises:
        UsageError: If the task does not tell classes apart.
    """

    def __init__(self, task: Task, columns: Sequence[Column]) -> None:
        if not isinstance(task, Classification | SequenceClassification | Segmentation):
            raise UsageError(
                "numbers by class are for tasks that predict one class",
                given=type(task).__name__,
                allowed="classification, sequence_classification, segmentation",
            )
        self._task = task
        named = task.target or next(c for c in columns if c.role == "target" and c.class_names)
        self._names = named.class_names
        self.results: tuple[ClassResult, ...] = ()
        """Of the first evaluation that was summed up."""

    def loss(self, outputs: Any, targets: Value) -> Tensor:
        return self._task.loss(outputs, targets)

    def terms(self, targets: Value) -> int:
        return self._task.terms(targets)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        classes = outputs.shape[1]
        table = confusion(outputs.argmax(dim=1), targets, classes)
        counts = torch.stack([table.diagonal(), table.sum(0), table.sum(1)])
        return torch.cat([self._task.sums(outputs, targets).double().flatten(), counts.flatten()])

    def values(self, sums: Tensor, terms: int, loss: float) -> dict[str, float]:
        classes = len(self._names)
        if not self.results:
            rows = cast(list[list[float]], sums[-3 * classes :].view(3, -1).T.tolist())
            self.results = tuple(map(_result, self._names, rows))
        return self._task.values(sums[: -3 * classes], terms, loss)


def _result(name: str, row: Sequence[float]) -> ClassResult:
    right, predicted, actual = row
    return ClassResult(
        name,
        round(actual),
        right / predicted if predicted else None,
        right / actual if actual else None,
        2 * right / (predicted + actual) if predicted + actual else None,
    )
