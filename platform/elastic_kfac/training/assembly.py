"""What a rank trains: model, task, passes and first-order optimizer of a configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.data.dataset import Dataset
from elastic_kfac.optimizers.averaging import WeightAverage
from elastic_kfac.optimizers.large_batch import WeightRescaling
from elastic_kfac.tasks.choice import make_task
from elastic_kfac.tasks.models import build_model
from elastic_kfac.tasks.task import Task
from elastic_kfac.training.activation_checkpointing import checkpoint_activations
from elastic_kfac.training.first_order import make_optimizer
from elastic_kfac.training.passes import ModelPasses
from elastic_kfac.training.precision import LossScaler
from elastic_kfac.training.sync import make_synchronisation
from elastic_kfac.training.sync.sync_batch_norm import synchronise_batch_norm
from elastic_kfac.training.sync.synchronisation import Synchronisation


@dataclass(frozen=True)
class Parts:
    """What outlives every resize of a process."""

    model: nn.Module
    task: Task
    passes: ModelPasses
    optimizer: torch.optim.Optimizer
    rescaling: WeightRescaling | None
    """Applied after every update."""
    average: WeightAverage | None
    sync: Synchronisation
    """Alone until it joins ranks."""
    scaler: LossScaler


def assemble(
    config: Config, communicator: Communicator, dataset: Dataset, device: torch.device
) -> Parts:
    """Builds the parts for samples like those of `dataset`. Collective."""
    task = make_task(config, dataset.columns)
    model = build_model(
        config.model,
        num_outputs=task.num_outputs(dataset.columns),
        input_shape=dataset.input_shape,
        columns=dataset.columns,
        seed=config.train.seed,
    ).to(device)
    model = join_batch_norm(config, model, communicator)
    if config.train.activation_checkpointing:
        checkpoint_activations(model)
    passes = ModelPasses(model, task, config, dataset, device)
    optimizer = make_optimizer(model, config.optimizer)
    rule = config.optimizer.rescale_weights
    rescaling = None if rule == "none" else WeightRescaling(model, rule)
    sync = make_synchronisation(config, model, optimizer, passes, dataset)
    scaler = LossScaler.for_precision(config.train.precision)
    decay = config.optimizer.average_decay
    average = None if decay is None else WeightAverage(model, decay)
    return Parts(model, task, passes, optimizer, rescaling, average, sync, scaler)


def join_batch_norm(config: Config, model: nn.Module, communicator: Communicator) -> nn.Module:
    """Synchronises batch normalisation over these ranks, where configured. Collective."""
    if not config.train.sync_batch_norm:
        return model
    return synchronise_batch_norm(
        model, communicator, group_size=config.train.sync_batch_norm_group
    )
