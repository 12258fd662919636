"""How ranks keep one model; `make_synchronisation` chooses the strategy of a configuration."""

from __future__ import annotations

import torch
from torch import nn

from elastic_kfac.config import Config
from elastic_kfac.data.dataset import Dataset
from elastic_kfac.training.sync.exchange import Exchange
from elastic_kfac.training.sync.global_sum import GlobalSum, ShardedByOwner
from elastic_kfac.training.sync.local_steps import LocalSteps
from elastic_kfac.training.sync.reproducible import CanonicalTree
from elastic_kfac.training.sync.synchronisation import Passes, Synchronisation


def make_synchronisation(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    passes: Passes,
    dataset: Dataset,
) -> Synchronisation:
    """The mode of a configuration, alone until `join`. `config.run` refuses what modes cannot do.

    Args:
        config: Its `elastic`, `communication` and `optimizer.name` choose.
        model: On its device; its parameters are the flat vector.
        optimizer: Its state is merged after local steps.
        passes: For gradients that a merge needs.
    """
    if config.elastic.reproducible:
        return CanonicalTree(model, config.elastic.logical_shards, counts_terms=passes.counts_terms)
    if config.elastic.takes_local_steps:
        return LocalSteps(config, model, optimizer, passes, dataset)
    if config.optimizer.name == "sharded_kfac":
        return ShardedByOwner(Exchange(model, counts_terms=passes.counts_terms), config)
    return GlobalSum(Exchange(model, counts_terms=passes.counts_terms), config)
