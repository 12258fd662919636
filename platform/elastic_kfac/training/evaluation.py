"""Evaluation on a whole split: every sample counts exactly once at any world size."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import TrainConfig
from elastic_kfac.config.train import EarlyStop
from elastic_kfac.data.batch import Batch
from elastic_kfac.data.dataset import Dataset, rank_slice
from elastic_kfac.tasks.attacks import Attack, perturbed
from elastic_kfac.tasks.by_class import ClassResult
from elastic_kfac.tasks.models import call_model
from elastic_kfac.tasks.preprocessing import Preprocessor
from elastic_kfac.tasks.task import Task
from elastic_kfac.training.precision import autocast

_TAG: Final = "evaluation"
_MOST_NUMBERS: Final = 4_000_000
"""In the table of sums by batch."""


@dataclass(frozen=True)
class EvalResult:
    """Mean loss and metrics over a split."""

    loss: float
    metrics: dict[str, float]
    """By name, the most important one first."""
    count: int
    """Samples."""
    attacked: EvalResult | None = field(default=None)
    """Result on attacked inputs, if an attack is configured."""
    classes: tuple[ClassResult, ...] = ()
    """The numbers of every class, where they were wanted."""

    def __getitem__(self, metric: str) -> float:
        return self.loss if metric == "loss" else self.metrics[metric]

    def columns(self, prefix: str) -> dict[str, float]:
        """Columns of a metric row."""
        return {f"{prefix}{name}": value for name, value in self.all.items()}

    @property
    def all(self) -> dict[str, float]:
        """The loss and every metric."""
        return {"loss": self.loss, **self.metrics}


@dataclass
class EarlyStopping:
    """Counts the evaluations since a metric improved; equal on all ranks, as evaluations are."""

    rule: EarlyStop
    direction: Literal["max", "min"]
    best: float | None = None
    stale: int = 0
    """Evaluations since the best one."""

    @property
    def is_over(self) -> bool:
        """Whether patience is exhausted."""
        return self.stale >= self.rule.patience

    def took(self, value: float) -> None:
        """Takes in an evaluation; NaN improves on nothing."""
        gain = 0.0 if self.best is None else value - self.best
        gain = gain if self.direction == "max" else -gain
        if self.best is None or gain > self.rule.min_delta:
            self.best, self.stale = value, 0
        else:
            self.stale += 1

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.rule.metric, "best": self.best, "stale": self.stale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Starts afresh from an empty state, or one of another metric."""
        same = state.get("metric") == self.rule.metric
        self.best, self.stale = (state["best"], state["stale"]) if same else (None, 0)


def evaluate_split(
    model: nn.Module,
    task: Task,
    dataset: Dataset,
    preprocess: Preprocessor,
    communicator: Communicator,
    config: TrainConfig,
    *,
    attack: Attack | None = None,
    whole_batches: bool = False,
) -> EvalResult:
    """Evaluates the model on a split divided among all ranks. Collective.

    Args:
        model: Left in training mode.
        attack: Also evaluate inputs perturbed by this attack.
        whole_batches: Divide the split at multiples of the batch size only, so that every batch has the
            same samples at every world size.
    """
    size, device = config.eval_batch_size, next(model.parameters()).device
    first, count = _own_slice(dataset.num_samples, size, communicator, whole_batches)
    plain, attacked = _Sums(task, dataset.num_samples, size), None
    if attack is not None:
        attacked = _Sums(task, dataset.num_samples, size)
    model.eval()
    try:
        for start in range(first, first + count, size):
            samples = dataset.read(0, start, min(size, first + count - start))
            dataset.prefetch(0, start + size, min(size, first + count - start - size))
            inputs = preprocess(samples)
            if not len(inputs):
                continue
            variants = [(plain, inputs.inputs)]
            if attack is not None and attacked is not None:
                moved = perturbed(
                    model, task.loss, inputs.inputs, inputs.targets, attack, ids=inputs.ids
                )
                variants.append((attacked, moved))
            for sums, tensors in variants:
                with torch.no_grad(), autocast(config.precision, device):
                    outputs = call_model(model, tensors)
                    loss = task.loss(outputs, inputs.targets)
                sums.add(start // size, loss, outputs, inputs)
    finally:
        model.train()
    result = plain.reduced(communicator, device)
    if attacked is None:
        return result
    return replace(result, attacked=attacked.reduced(communicator, device))


class _Sums:
    """What an evaluation adds up: one row per batch of the split, so that the order of the additions
    does not depend on the ranks."""

    def __init__(self, task: Task, num_samples: int, batch_size: int) -> None:
        self._task = task
        self._batches = -(-num_samples // batch_size)
        self._rows: dict[int, Tensor] = {}
        """By batch: samples, terms, loss, and the sums of the task."""
        self._records: list[tuple[int, Any]] = []

    def add(self, batch: int, loss: Tensor, outputs: Any, inputs: Batch) -> None:
        """Adds the outputs for some of the samples of a batch."""
        task, targets = self._task, inputs.targets
        head = torch.tensor([len(inputs), task.terms(targets)], dtype=torch.float64)
        sums = task.sums(outputs, targets).double()
        row = torch.cat([head.to(loss.device), loss.double().view(1), sums.to(loss.device)])
        self._rows[batch] = self._rows[batch] + row if batch in self._rows else row
        records = task.records(outputs, targets)
        self._records += zip(inputs.ids.tolist(), records, strict=False)

    def reduced(self, communicator: Communicator, device: torch.device) -> EvalResult:
        """The result over all ranks. Collective."""
        widths = [len(row) for row in self._rows.values()]
        width = max(communicator.all_gather_object(widths[0] if widths else 0, tag=_TAG))
        # Large tables are counts, which are exact in any order.
        batches = self._batches if self._batches * width <= _MOST_NUMBERS else 1
        table = torch.zeros(batches, width, dtype=torch.float64, device=device)
        for batch, row in self._rows.items():
            table[min(batch, batches - 1)] += row
        communicator.all_reduce(table, tag=_TAG).wait()
        total = table.sum(0).cpu()
        samples, terms, loss = total[:3].tolist()
        mean = loss / max(terms, 1)
        metrics = self._task.values(total[3:], round(terms), mean)
        if type(self._task).records is not Task.records:
            everybody = communicator.all_gather_object(self._records, tag=_TAG)
            records = sorted((one for part in everybody for one in part), key=lambda one: one[0])
            metrics |= self._task.values_of_records([record for _, record in records])
        return EvalResult(mean, metrics, round(samples))


def _own_slice(
    num_samples: int, size: int, communicator: Communicator, whole_batches: bool
) -> tuple[int, int]:
    rank, world_size = communicator.rank, communicator.world_size
    if not whole_batches:
        return rank_slice(0, num_samples, rank, world_size)
    begin, batches = rank_slice(0, -(-num_samples // size), rank, world_size)
    return begin * size, max(0, min(num_samples, (begin + batches) * size) - begin * size)
