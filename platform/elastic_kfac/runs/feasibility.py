"""Before a run starts: its plan at any world size, and whether it fits the cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.data.dataset import open_split
from elastic_kfac.errors import ConfigError
from elastic_kfac.kfac.shapes import layer_shape
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.traffic import memory_elements
from elastic_kfac.tasks.models import build_model
from elastic_kfac.training.first_order import make_optimizer
from elastic_kfac.training.preconditioner import make_preconditioner

if TYPE_CHECKING:
    from elastic_kfac.kfac.kfac import KFAC


class ImaginedWorld(Communicator):
    """Rank 0 of `world_size` ranks that all agree with it: enough to plan, not to communicate."""

    def __init__(self, world_size: int) -> None:
        super().__init__(None)
        self.world_size = world_size

    def subgroup(self, ranks: Sequence[int]) -> None:
        """There are no peers to form a group with."""
        return

    def all_gather_object(self, obj: Any, *, tag: str) -> list[Any]:
        """Every rank would send the same object."""
        return [obj] * self.world_size


def imagined_paths(
    config: Config, world_sizes: Sequence[int]
) -> Iterator[tuple[nn.Module, KFAC | None]]:
    """The model and its preconditioner at every world size, built by the training code.

    Raises:
        DataError: If the shards are missing: they give the shape of the images.
        ConfigError: If the model or a plan is impossible.
    """
    with open_split(config, config.data.train_split) as split:
        model = build_model(
            config.model,
            num_classes=split.num_classes,
            image_shape=split.image_shape,
            seed=config.train.seed,
        )
    optimizer = make_optimizer(model, config.optimizer)
    for world_size in world_sizes:
        kfac = make_preconditioner(model, optimizer, config, ImaginedWorld(world_size))
        try:
            yield model, kfac
        finally:
            if kfac is not None:
                kfac.close()


def plans(config: Config, world_sizes: Sequence[int]) -> Iterator[Plan]:
    """The plan for every world size.

    Raises:
        DataError: As `imagined_paths`.
    """
    for _, kfac in imagined_paths(config, world_sizes):
        if kfac is not None:
            yield kfac.plan


def why_infeasible(config: Config, room: int) -> str | None:
    """The reason why a run cannot work on a cluster with room for `room` workers, or None.

    It must fit at every size that it may be resized to: at the smallest one, where an owner keeps
    most, and at the largest.
    """
    elastic = config.elastic
    if elastic.min_workers > room:
        return f"elastic.min_workers={elastic.min_workers}, the cluster has room for {room} workers"
    largest = min(elastic.max_workers, room)
    if config.train.global_batch_size < largest:
        return (
            f"train.global_batch_size={config.train.global_batch_size} leaves some of {largest} "
            "workers without a sample"
        )
    budget_gib = config.plan.memory_budget_gib
    if budget_gib is None:
        return None
    sizes = sorted({elastic.min_workers, largest})
    try:
        for world_size, (_, kfac) in zip(sizes, imagined_paths(config, sizes), strict=True):
            if kfac is None or kfac.sums_gradients:
                continue
            held = max(
                memory_elements(
                    kfac.plan,
                    [layer_shape(layer) for layer in kfac.layers],
                    method=config.kfac.method,
                    precompute=config.kfac.precompute,
                )
            )
            needed_gib = held * 4 / 2**30
            if needed_gib > budget_gib:
                return (
                    f"plan.memory_budget_gib={budget_gib:.4g}: factors and decompositions take "
                    f"{needed_gib:.4g} GiB on the fullest of {world_size} ranks "
                    f"(kfac.grad_worker_frac={config.kfac.grad_worker_frac})"
                )
    except ConfigError as error:
        return error.line()
    return None
