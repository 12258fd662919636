"""Evaluation on a whole split: every sample counts exactly once at any world size."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import TrainConfig
from elastic_kfac.data.dataset import Dataset, rank_slice
from elastic_kfac.tasks.attacks import Attack, perturbed
from elastic_kfac.tasks.losses import Task
from elastic_kfac.tasks.preprocessing import Preprocessor
from elastic_kfac.training.precision import autocast


@dataclass(frozen=True)
class EvalResult:
    """Mean loss and exact counts over a split."""

    loss: float
    correct: int
    count: int
    attacked: EvalResult | None = field(default=None)
    """Result on attacked inputs, if an attack is configured."""

    @property
    def accuracy(self) -> float:
        return self.correct / self.count


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
    batches = -(-dataset.num_samples // size)
    sums = torch.zeros(batches, 5, dtype=torch.float64, device=device)
    model.eval()
    try:
        for start in range(first, first + count, size):
            samples = dataset.read(0, start, min(size, first + count - start))
            dataset.prefetch(0, start + size, min(size, first + count - start - size))
            inputs = preprocess(samples)
            if not len(inputs.labels):
                continue
            row = sums[start // size]
            row[0] += len(inputs.labels)
            variants = [inputs.images]
            if attack is not None:
                variants.append(
                    perturbed(
                        model, task.loss, inputs.images, inputs.labels, attack, ids=inputs.ids
                    )
                )
            for place, images in zip((1, 3), variants, strict=False):
                with torch.no_grad(), autocast(config.precision, device):
                    outputs = model(images)
                    loss = task.loss(outputs, inputs.labels)
                row[place] += loss
                row[place + 1] += task.correct(outputs, inputs.labels)
    finally:
        model.train()
    communicator.all_reduce(sums, tag="evaluation").wait()
    seen, *counted = sums.sum(0).tolist()
    results = [
        EvalResult(counted[place] / seen, round(counted[place + 1]), round(seen))
        for place in (0, 2)
    ]
    if attack is None:
        return results[0]
    return EvalResult(results[0].loss, results[0].correct, results[0].count, results[1])


def _own_slice(
    num_samples: int, size: int, communicator: Communicator, whole_batches: bool
) -> tuple[int, int]:
    rank, world_size = communicator.rank, communicator.world_size
    if not whole_batches:
        return rank_slice(0, num_samples, rank, world_size)
    begin, batches = rank_slice(0, -(-num_samples // size), rank, world_size)
    return begin * size, max(0, min(num_samples, (begin + batches) * size) - begin * size)
