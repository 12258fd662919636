"""Forward and backward passes of one rank over samples that are attacked, mixed and erased first."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from elastic_kfac.config import Config
from elastic_kfac.data.batch import Batch, Value, mapped, real_positions
from elastic_kfac.data.columns import check_one_tensor
from elastic_kfac.data.dataset import Dataset
from elastic_kfac.state.identity import counter_seed
from elastic_kfac.tasks.attacks import Attack, adversarial_mask, mix_adversarial, training_attack
from elastic_kfac.tasks.mixing import Mixup, RandomErasing
from elastic_kfac.tasks.models import call_model
from elastic_kfac.tasks.preprocessing import Preprocessor
from elastic_kfac.tasks.task import Task
from elastic_kfac.training.precision import autocast
from elastic_kfac.training.sync.synchronisation import Passed, Span

if TYPE_CHECKING:
    from elastic_kfac.kfac.kfac import KFAC


class _Recorded(NamedTuple):
    """One pass."""

    inputs: Value
    targets: Value
    seed: tuple[int, int]
    loss: Tensor


class ModelPasses:
    """Passes through one model; see `synchronisation.Passes`."""

    def __init__(
        self, model: nn.Module, task: Task, config: Config, dataset: Dataset, device: torch.device
    ) -> None:
        self._model, self._task, self._config, self._device = model, task, config, device
        seed = config.train.seed
        self.preprocess = Preprocessor(
            dataset,
            next(model.parameters()).dtype,
            device,
            lambda batch, epoch: task.prepare(batch, seed, epoch),
        )
        self._attack: Attack | None = training_attack(config.adversarial, self.preprocess, dataset)
        mixing = config.mixing
        self._mixup: Mixup | None = None
        if mixing.erasing > 0:
            check_one_tensor(dataset.columns, "mixing.erasing", image=True)
        if mixing.mixup != "none":
            check_one_tensor(dataset.columns, "mixing.mixup")
            self._mixup = Mixup(
                mixing.alpha,
                dataset.num_outputs,
                seed=seed,
                running=mixing.mixup == "running",
                on_smaller=mixing.on_smaller,
            )
        self.transform: Callable[[Batch, int], Batch] = lambda batch, epoch: batch
        """What a person's hooks make of the samples of an epoch."""
        self._recorded: list[_Recorded] | None = None
        self._seed = (0, 0)
        self._erasing = RandomErasing(seed, mixing.erasing) if mixing.erasing > 0 else None

    @property
    def counts_terms(self) -> bool:
        return self._task.counts_terms

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
        """(loss then, loss with the present weights, terms) of each recorded pass.

        Inputs and randomness are the same. Overwrites running statistics, which `finish_step` sets anew.
        """
        found = []
        for one in self._recorded or ():
            self.seed(*one.seed)
            loss = self._loss(one.inputs, one.targets)[1]
            found.append((float(one.loss), float(loss), self._task.terms(one.targets)))
        self._recorded = None
        return found

    def seed(self, step: int, index: int) -> None:
        self._seed = (step, index)
        torch.manual_seed(counter_seed(self._config.train.seed, step, index))

    def inputs(self, samples: Batch, span: Span) -> Batch:
        inputs = self.transform(self.preprocess(samples, span.epoch), span.epoch)
        images, labels = inputs.inputs, inputs.targets
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
        return replace(inputs, inputs=images, targets=labels)

    def backward(
        self, inputs: Value, targets: Value, loss_scale: float, kfac: KFAC | None
    ) -> Passed:
        terms = self._task.terms(targets)
        with self._described(kfac, inputs, terms):
            outputs, loss = self._loss(inputs, targets)
        if self._recorded is not None:
            self._recorded.append(_Recorded(inputs, targets, self._seed, loss.detach()))
        if kfac is not None and self._config.kfac.fisher != "empirical":
            predicted, likelihood = self._task.fisher(outputs, targets)
            kfac.sample_fisher(predicted, likelihood=likelihood)
        (loss * loss_scale).backward()
        correct = self._task.correct(mapped(outputs, torch.detach), targets)
        return Passed(loss.detach(), correct, terms)

    def _described(
        self, kfac: KFAC | None, inputs: Value, terms: int
    ) -> AbstractContextManager[object]:
        """Names the samples of a pass to K-FAC, where it cannot count them in the inputs."""
        mask = real_positions(inputs)
        if kfac is None or (mask is None and not self._task.counts_terms):
            return nullcontext()
        return kfac.micro_batch(terms if self._task.counts_terms else len(inputs), mask=mask)

    def _loss(self, inputs: Value, targets: Value) -> tuple[Value, Tensor]:
        """Outputs and the summed loss."""
        with autocast(self._config.train.precision, self._device):
            outputs = call_model(self._model, inputs)
            return outputs, self._task.loss(outputs, targets)
