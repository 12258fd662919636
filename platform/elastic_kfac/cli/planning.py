"""Plans of a configuration for worlds that do not exist."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.data.shards import ShardSet
from elastic_kfac.data.stream import SampleStream
from elastic_kfac.placement.plan import Plan
from elastic_kfac.training.first_order import make_optimizer
from elastic_kfac.training.models import build_model
from elastic_kfac.training.second_order import GradientPath


class ImaginedWorld(Communicator):
    """Rank 0 of `world_size` ranks that all agree with it: enough to plan, not to communicate."""

    def __init__(self, world_size: int) -> None:
        super().__init__(None)
        self.world_size = world_size

    def subgroup(self, ranks: Sequence[int]) -> None:
        """Nobody is there to form a group with."""
        return

    def all_gather_object(self, obj: Any, *, tag: str) -> list[Any]:
        """Everybody says the same."""
        return [obj] * self.world_size


def plans(config: Config, world_sizes: Sequence[int]) -> Iterator[Plan]:
    """The plan of every world size, made by the code that training runs.

    Raises:
        DataError: If the shards, which say how large images are, are not there.
    """
    shards = ShardSet.open(f"{config.data.shards.rstrip('/')}/{config.data.train_split}")
    model = build_model(
        config.model,
        num_classes=shards.num_classes,
        image_shape=SampleStream(shards, seed=config.train.seed).image_shape,
        seed=config.train.seed,
    )
    optimizer = make_optimizer(model, config.optimizer)
    for world_size in world_sizes:
        path = GradientPath(model, optimizer, config, ImaginedWorld(world_size))
        owner = path.kfac or path.sharded
        if owner is not None:
            yield owner.plan
        path.close()
