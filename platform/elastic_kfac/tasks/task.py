"""What a run learns: a loss as a sum, what to divide it by, and the metrics of an evaluation.

Losses are sums and come with the number of their terms, so that gradients summed over micro-batches and
ranks are the gradient of the global mean. Metrics are functions of further sums, which are added over
samples and ranks: every sample counts once at any world size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from elastic_kfac.data.batch import Batch, Fields, Value, outputs_for
from elastic_kfac.data.columns import Column, Kind
from elastic_kfac.errors import ConfigError

SumLoss = Callable[[Any, Any], Tensor]
"""(outputs, targets) to the SUM of the samples' losses."""
Likelihood = Literal["categorical", "gaussian"]


class Task:
    """The interface of all tasks, and the defaults of one whose loss is a sum over samples.

    A person's own task is a subclass, or a factory `(columns, **task.arguments)` of one, named by
    `task.name: package.module:Name`. `loss`, `sums` and `values` are all that it needs.
    """

    metrics: ClassVar[Mapping[str, Literal["max", "min"]]] = {}
    """Metrics that `values` returns, the most important one first, and whether larger or smaller
    values are better. `loss` is one more, "min"."""
    counts_terms: ClassVar[bool] = False
    """Whether the loss is divided by `terms` (tokens, pixels) instead of samples."""
    has_accuracy: ClassVar[bool] = False
    """Whether `correct` counts the terms that are predicted right: the column `accuracy` of a step."""

    def direction_of(self, metric: str) -> Literal["max", "min"]:
        """Whether larger or smaller values are better."""
        return self.metrics.get(metric, "min")

    @property
    def main_metric(self) -> str:
        """The most important metric."""
        return next(iter(self.metrics), "loss")

    def num_outputs(self, columns: Sequence[Column]) -> int:
        """What model factories get as `num_outputs` (see `outputs_for`)."""
        return outputs_for(columns)

    def prepare(self, batch: Batch, seed: int, epoch: int) -> Batch:
        """Makes the targets of a batch, if its samples have none.

        Args:
            batch: On the device, normalised.
            seed: Of the run.
            epoch: With `seed` and `batch.ids` all that random choices may depend on.
        """
        return batch

    def loss(self, outputs: Any, targets: Value) -> Tensor:
        """The loss summed over all terms of a batch, a scalar."""
        raise NotImplementedError

    def terms(self, targets: Value) -> int:
        """The number of terms of the loss."""
        return len(targets)

    def correct(self, outputs: Any, targets: Value) -> Tensor:
        """The number of terms that are predicted right, a scalar."""
        return torch.zeros(())

    def sums(self, outputs: Any, targets: Value) -> Tensor:
        """What metrics need, summed over the samples of a batch: float64 [k]."""
        return torch.zeros(0, dtype=torch.float64)

    def values(self, sums: Tensor, terms: int, loss: float) -> dict[str, float]:
        """The metrics.

        Args:
            sums: Of all samples, float64 [k].
            terms: Of all samples.
            loss: The mean over terms.
        """
        return {}

    def records(self, outputs: Any, targets: Value) -> list[Any]:
        """One object per sample for metrics that are no function of sums; ranks exchange them."""
        return []

    def values_of_records(self, records: Sequence[Any]) -> dict[str, float]:
        """Further metrics, of the records of all samples in the order of their ids."""
        return {}

    def fisher(self, outputs: Any, targets: Value) -> tuple[Tensor, Likelihood]:
        """The outputs that parameterise a distribution, [n, classes, ...] or means [n, ...], and which
        one, for Fisher matrices of the model's own labels."""
        return outputs, "categorical"


class TargetTask(Task):
    """A task with one target; further targets of a set are left out.

    Args:
        columns: Of the set.
        kind: Of the target.
        name: Of the task, for the error.
        source: Where such sets come from, for the error.

    Raises:
        ConfigError: If the set has no such target, or several.
    """

    def __init__(self, columns: Sequence[Column], kind: Kind, name: str, source: str) -> None:
        found = [column for column in columns if (column.role, column.kind) == ("target", kind)]
        if len(found) != 1:
            raise ConfigError(
                f"task.name={name} needs one target of kind {kind}",
                given=", ".join(f"{c.name} ({c.role}: {c.kind})" for c in columns),
                change=f"make the shards from {source}",
            )
        self.target = found[0]

    def direction_of(self, metric: str) -> Literal["max", "min"]:
        """Whether larger or smaller values are better."""
        return self.metrics.get(metric, "min")

    @property
    def main_metric(self) -> str:
        """The most important metric."""
        return next(iter(self.metrics), "loss")

    def num_outputs(self, columns: Sequence[Column]) -> int:
        return outputs_for((self.target,))

    def prepare(self, batch: Batch, seed: int, epoch: int) -> Batch:
        if isinstance(batch.targets, Fields):
            return replace(batch, targets=batch.targets[self.target.name])
        return batch
