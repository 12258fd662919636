"""Forward and backward passes of one rank over samples that are attacked, mixed and erased first."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from elastic_kfac.config import Config
from elastic_kfac.data.dataset import Dataset
from elastic_kfac.data.stream import Batch
from elastic_kfac.state.identity import counter_seed
from elastic_kfac.tasks.attacks import Attack, adversarial_mask, mix_adversarial, training_attack
from elastic_kfac.tasks.losses import Task
from elastic_kfac.tasks.mixing import Mixup, RandomErasing
from elastic_kfac.tasks.preprocessing import Preprocessor
from elastic_kfac.training.precision import autocast
from elastic_kfac.training.sync.synchronisation import Span

if TYPE_CHECKING:
    from elastic_kfac.kfac.kfac import KFAC


class _Recorded(NamedTuple):
    """One pass."""

    images: Tensor
    labels: Tensor
    seed: tuple[int, int]
    loss: Tensor


class ModelPasses:
    """Passes through one model; see `synchronisation.Passes`."""

    def __init__(
        self, model: nn.Module, task: Task, config: Config, dataset: Dataset, device: torch.device
    ) -> None:
        self._model, self._task, self._config, self._device = model, task, config, device
        self.preprocess = Preprocessor(dataset, next(model.parameters()).dtype, device)
        self._attack: Attack | None = training_attack(config.adversarial, self.preprocess, dataset)
        mixing, seed = config.mixing, config.train.seed
        self._mixup: Mixup | None = None
        if mixing.mixup != "none":
            self._mixup = Mixup(
                mixing.alpha,
                dataset.num_classes,
                seed=seed,
                running=mixing.mixup == "running",
                on_smaller=mixing.on_smaller,
            )
        self._recorded: list[_Recorded] | None = None
        self._seed = (0, 0)
        self._erasing = RandomErasing(seed, mixing.erasing) if mixing.erasing > 0 else None

    def forget_mixed(self) -> None:
        """Makes the next batch an unmixed one, as after every restore and resize."""
        if self._mixup is not None:
            self._mixup.drop()

    def no_inputs(self) -> Batch:
        return self.preprocess.empty()

    def record(self, recording: bool) -> None:
        """Whether the coming passes are kept for `replay`; earlier ones are dropped."""
        self._recorded = [] if recording else None

    @torch.no_grad()
    def replay(self) -> list[tuple[float, float, int]]:
        """(loss then, loss with the present weights, samples) of each recorded pass.

        Inputs and randomness are the same. Overwrites running statistics, which `finish_step` sets anew.
        """
        found = []
        for one in self._recorded or ():
            self.seed(*one.seed)
            loss = self._loss(one.images, one.labels)[1]
            found.append((float(one.loss), float(loss), len(one.labels)))
        self._recorded = None
        return found

    def seed(self, step: int, index: int) -> None:
        self._seed = (step, index)
        torch.manual_seed(counter_seed(self._config.train.seed, step, index))

    def inputs(self, samples: Batch, span: Span) -> Batch:
        inputs = self.preprocess(samples)
        images, labels = inputs.images, inputs.labels
        if self._attack is not None and span.attacked_fraction > 0 and len(labels):
            mask = adversarial_mask(
                span.own_first - span.first,
                len(samples),
                span.count,
                micro_batch_size=self._config.train.global_batch_size,
                fraction=span.attacked_fraction,
            )
            images = mix_adversarial(
                self._model,
                self._task.loss,
                images,
                labels,
                mask[samples.good],
                self._attack,
                ids=inputs.ids,
                seed=self._config.train.seed,
                counter=span.step,
                chunk_size=self._config.train.micro_batch_size,
            )
        if self._mixup is not None:
            images, labels = self._mixup(images, labels, inputs.ids, span.epoch)
        if self._erasing is not None:
            images = self._erasing(images, inputs.ids, span.epoch)
        return replace(inputs, images=images, labels=labels)

    def backward(
        self, images: Tensor, labels: Tensor, loss_scale: float, kfac: KFAC | None
    ) -> tuple[Tensor, Tensor]:
        outputs, loss = self._loss(images, labels)
        if self._recorded is not None:
            self._recorded.append(_Recorded(images, labels, self._seed, loss.detach()))
        if kfac is not None and self._config.kfac.fisher != "empirical":
            kfac.sample_fisher(outputs)
        (loss * loss_scale).backward()
        return loss.detach(), self._task.correct(outputs.detach(), labels)

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and the summed loss."""
        with autocast(self._config.train.precision, self._device):
            outputs = self._model(images)
            return outputs, self._task.loss(outputs, labels)
