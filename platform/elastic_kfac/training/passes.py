"""One rank's part of a step: attack, mix and erase its samples, then forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.data.dataset import Dataset
from elastic_kfac.data.order import id_hash
from elastic_kfac.data.stream import Batch
from elastic_kfac.state.identity import counter_seed
from elastic_kfac.tasks.attacks import Attack, adversarial_mask, mix_adversarial, training_attack
from elastic_kfac.tasks.losses import Task
from elastic_kfac.tasks.mixing import Mixup, RandomErasing
from elastic_kfac.tasks.preprocessing import Preprocessor
from elastic_kfac.training.precision import autocast
from elastic_kfac.training.sync.exchange import Exchange, Totals
from elastic_kfac.training.sync.reproducible import ReproducibleExchange

if TYPE_CHECKING:
    from elastic_kfac.kfac.kfac import KFAC


@dataclass(frozen=True)
class Place:
    """Which step a pass belongs to, and where in its batch this rank's share begins."""

    step: int
    epoch: int
    global_count: int
    own_offset: int = 0
    attacked_fraction: float = 0.0


class Passes:
    """Forward and backward over one rank's share of a batch."""

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
        self._erasing: RandomErasing | None = None
        if mixing.erasing > 0:
            self._erasing = RandomErasing(seed, mixing.erasing)

    def drop_mixed(self) -> None:
        """Forgets the last mixed batch: after a resize or a restore the next one is unmixed."""
        if self._mixup is not None:
            self._mixup.drop()

    def run(
        self,
        exchange: Exchange,
        communicator: Communicator,
        kfac: KFAC | None,
        samples: Batch | None,
        place: Place,
        loss_scale: float,
    ) -> Totals:
        """What this rank adds to the step; without samples there is nothing to add.

        `loss_scale` is what a sample's loss is multiplied by before the backward pass.
        """
        if isinstance(exchange, ReproducibleExchange):
            exchange.begin_step()
            return self._shards(exchange, communicator, kfac, samples, place, loss_scale)
        together = self._config.train.sync_batch_norm and communicator.world_size > 1
        inputs = None
        if samples is not None:
            # Before the step begins: an attack needs the averages of the running statistics.
            inputs = self._prepared(samples, place)
        exchange.begin_step()
        if inputs is None:
            if not together:
                return Totals()
            inputs = self.preprocess.empty()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        correct = torch.zeros((), dtype=torch.float64, device=self._device)
        size = self._config.train.micro_batch_size or max(len(inputs.labels), 1)
        longest = len(inputs.labels)
        if together:
            # Every rank goes through as many passes as the one with the largest share.
            longest = -(-place.global_count // communicator.world_size)
            size = self._config.train.micro_batch_size or longest
        for start in range(0, longest, size):
            part = slice(start, start + size)
            labels = inputs.labels[part]
            if len(labels):
                # Never the state of a generator: the same sample range has the same dropout
                # everywhere.
                torch.manual_seed(
                    counter_seed(self._config.train.seed, place.step, int(inputs.ids[start]))
                )
            exchange.begin_pass()
            loss, right = self._pass(kfac, inputs.images[part], labels, loss_scale)
            exchange.end_pass(len(labels))
            loss_sum += loss
            correct += right
        return Totals(
            loss_sum=float(loss_sum),
            correct=float(correct),
            count=len(inputs.labels),
            id_hash=0 if samples is None else id_hash(samples.ids),
        )

    def gradient(self, exchange: Exchange, samples: Batch | None) -> Totals:
        """Local sums of gradients over some samples as they are, without K-FAC's statistics."""
        exchange.begin_step()
        if samples is None:
            return Totals()
        inputs = self.preprocess(samples)
        size = self._config.train.micro_batch_size or max(len(inputs.labels), 1)
        for start in range(0, len(inputs.labels), size):
            part = slice(start, start + size)
            exchange.begin_pass()
            self._pass(None, inputs.images[part], inputs.labels[part], 1.0)
            exchange.end_pass(len(inputs.labels[part]))
        return Totals(count=len(inputs.labels))

    def _shards(
        self,
        exchange: ReproducibleExchange,
        communicator: Communicator,
        kfac: KFAC | None,
        samples: Batch | None,
        place: Place,
        loss_scale: float,
    ) -> Totals:
        """One pass per logical shard, each a leaf of the summation tree."""
        for shard, part in exchange.shards(communicator, kfac, place.global_count):
            assert samples is not None
            inputs = self._prepared(samples.part(part), place)
            torch.manual_seed(counter_seed(self._config.train.seed, place.step, shard))
            exchange.begin_pass()
            loss = right = 0.0
            if len(inputs.labels):
                # Clones, because kernels may round differently on memory that begins elsewhere.
                values = self._pass(kfac, inputs.images.clone(), inputs.labels.clone(), loss_scale)
                loss, right = float(values[0]), float(values[1])
            totals = Totals(loss, right, len(inputs.labels), id_hash=id_hash(samples.ids[part]))
            exchange.end_shard(shard, totals, loss_scale)
        return Totals()

    def _prepared(self, batch: Batch, place: Place) -> Batch:
        """The good records on the device, attacked, mixed and erased as configured."""
        inputs = self.preprocess(batch)
        images, labels = inputs.images, inputs.labels
        if self._attack is not None and place.attacked_fraction > 0 and len(labels):
            mask = adversarial_mask(
                place.own_offset,
                len(batch),
                place.global_count,
                micro_batch_size=self._config.train.global_batch_size,
                fraction=place.attacked_fraction,
            )
            images = mix_adversarial(
                self._model,
                self._task.loss,
                images,
                labels,
                mask[batch.good],
                self._attack,
                ids=inputs.ids,
                seed=self._config.train.seed,
                counter=place.step,
                chunk_size=self._config.train.micro_batch_size,
            )
        if self._mixup is not None:
            images, labels = self._mixup(images, labels, inputs.ids, place.epoch)
        if self._erasing is not None:
            images = self._erasing(images, inputs.ids, place.epoch)
        return replace(inputs, images=images, labels=labels)

    def _pass(
        self, kfac: KFAC | None, images: Tensor, labels: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward over one batch; its summed loss and how many are right."""
        with autocast(self._config.train.precision, self._device):
            outputs = self._model(images)
            loss = self._task.loss(outputs, labels)
        if kfac is not None and self._config.kfac.fisher != "empirical":
            kfac.sample_fisher(outputs)
        (loss * scale).backward()
        return loss.detach(), self._task.correct(outputs.detach(), labels)
