"""Who computes what of K-FAC and how it travels: one class per strategy behind `Distribution`."""

from __future__ import annotations

from torch import nn

from elastic_kfac.config.kfac import ShardedConfig
from elastic_kfac.curvature.dtensors import is_sharded
from elastic_kfac.errors import ConfigError
from elastic_kfac.kfac.distribution.fully_sharded import FullySharded
from elastic_kfac.kfac.distribution.grid import KaisaGrid
from elastic_kfac.kfac.distribution.resize import ResizeReport
from elastic_kfac.kfac.distribution.sharded import ShardedByOwner
from elastic_kfac.kfac.distribution.strategy import (
    Basis,
    Distribution,
    Gradients,
    States,
    as_communicator,
)
from elastic_kfac.kfac.distribution.tree import CanonicalTree
from elastic_kfac.kfac.timers import PHASES, Timers
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.simulator import Calibration

__all__ = [
    "PHASES",
    "Basis",
    "Calibration",
    "Distribution",
    "Gradients",
    "Plan",
    "ResizeReport",
    "States",
    "Timers",
    "as_communicator",
    "make_distribution",
]


def make_distribution(
    basis: Basis,
    *,
    model: nn.Module,
    sharding: ShardedConfig | None,
    tree: bool,
) -> Distribution:
    """The strategy that KFAC's arguments name.

    Raises:
        ConfigError: If they name two, or one for a fully sharded model, or one whose statistics cannot
            come a step later.
    """
    if basis.options.overlap_reduction and (tree or sharding is not None):
        raise ConfigError(
            "overlap_reduction leaves statistics to the next step, and here they travel with the "
            "gradients, which this step needs",
            given="overlap_reduction=True with " + ("tree=True" if tree else "sharding"),
            allowed="replicated gradients, or a fully_sharded model",
            change="leave overlap_reduction out",
        )
    if any(is_sharded(p) for layer in basis.layers for p in layer.parameters):
        if tree or sharding is not None:
            raise ConfigError(
                "a fully sharded model has a distribution of its own",
                given="tree" if tree else "sharding",
                change="leave it out",
            )
        return FullySharded(basis, model=model)
    if tree and sharding is not None:
        raise ConfigError("tree and sharding both reduce the statistics", allowed="one of them")
    if sharding is not None:
        return ShardedByOwner(basis, model=model, sharding=sharding)
    return CanonicalTree(basis) if tree else KaisaGrid(basis)
