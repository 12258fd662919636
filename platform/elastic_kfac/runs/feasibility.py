"""Before a run: its placement at any number of ranks, from shapes alone, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic_kfac.config import Config
from elastic_kfac.data.dataset import open_split
from elastic_kfac.errors import ConfigError, ElasticKfacError
from elastic_kfac.kfac.shapes import plan_of, shapes
from elastic_kfac.placement.costs import LayerShape
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.simulator import Calibration
from elastic_kfac.tasks.losses import make_task
from elastic_kfac.tasks.models import ImageShape, build_model, evaluating


@dataclass(frozen=True)
class Sized:
    """A configured model with the shapes that placement depends on."""

    config: Config
    model: nn.Module
    image_shape: ImageShape
    num_classes: int
    layers: tuple[LayerShape, ...]
    """Layers that K-FAC covers, or what one rank owns with `optimizer.name: sharded_kfac`."""

    @classmethod
    def of(
        cls, config: Config, image_shape: ImageShape | None = None, num_classes: int = 1000
    ) -> Sized:
        """Builds the model of a configuration.

        Args:
            image_shape: The shape of a sample, where there are no shards to take it and the classes
                from.
            num_classes: Used with `image_shape` only.

        Raises:
            DataError: If the shards, which define the image shape, do not exist.
            ConfigError: If the model is impossible.
        """
        if image_shape is None:
            with open_split(config, config.data.train_split) as split:
                image_shape, num_classes = split.image_shape, split.num_classes
        model = build_model(
            config.model, num_classes=num_classes, image_shape=image_shape, seed=config.train.seed
        )
        sharded = config.optimizer.name == "sharded_kfac"
        has_layers = config.kfac.enabled or sharded
        layers = shapes(model, config.kfac, sharded=sharded) if has_layers else ()
        return cls(config, model, image_shape, num_classes, tuple(layers))

    @property
    def parameter_elements(self) -> int:
        """Parameters of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def loss(self, samples: int) -> Tensor:
        """A scalar of the model's output on random samples, for passes whose values do not matter."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(samples, *self.image_shape, generator=generator)
        loss: Tensor = self.model(images).logsumexp(1).mean()
        return loss

    def plan(
        self,
        world_size: int,
        previous: Plan | None = None,
        calibration: Calibration | None = None,
    ) -> Plan:
        """The plan of a run, or after a resize from `previous`; with stored costs unless others are
        given.

        Raises:
            ConfigError: If nothing fits the memory budget.
        """
        budget = self.config.plan.memory_budget_gib
        return plan_of(
            self.layers,
            world_size,
            self.config.kfac,
            sharded=self.config.optimizer.name == "sharded_kfac",
            memory_budget_bytes=None if budget is None else budget * 2**30,
            calibration=calibration,
            device_type="cuda" if self.config.resources.use_gpu else "cpu",
            previous=previous,
        )


def check_parts(config: Config) -> None:
    """Tries model and loss on two random images, so that what does not fit is found before a cluster
    starts.

    Raises:
        DataError: As `Sized.of`.
        ConfigError: If model, loss and data do not fit, or the loss is no sum over samples.
    """
    sized = Sized.of(config)
    model, task = sized.model, make_task(config.train)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(model):
        images = torch.randn(2, *sized.image_shape, dtype=next(model.parameters()).dtype)
        labels = torch.tensor([0, sized.num_classes - 1])
        try:
            outputs = model(images)
            task.correct(outputs, labels)
            loss = task.loss(outputs, labels)
            doubled = task.loss(torch.cat([outputs, outputs]), torch.cat([labels, labels]))
            values = [float(loss), float(doubled)]
        except ElasticKfacError:
            raise
        except Exception as error:
            line = str(error).strip().splitlines() or [""]
            raise ConfigError(
                f"model and loss fail on a batch of images: {type(error).__name__}: {line[0]}",
                given=f"model.name={config.model.name}, train.loss={config.train.loss}, "
                f"images {list(images.shape)}",
                change="try model and loss on one batch of the data",
            ) from error
    if values[0] > 0 and abs(values[1] / values[0] - 2) > 0.1:
        raise ConfigError(
            "train.loss is not a sum over samples: the same samples twice must double it",
            given=f"{values[0]:.4g}, and {values[1]:.4g} for the same samples twice",
            change='return the sum, for example with reduction="sum"',
        )


def why_infeasible(config: Config, room: int) -> str | None:
    """Why a run cannot work on a cluster with room for `room` workers; None if it can.

    It must fit at the smallest world size, where an owner holds most, and at the largest.
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
    has_state = config.kfac.enabled or config.optimizer.name == "sharded_kfac"
    if config.plan.memory_budget_gib is None or not has_state:
        return None
    try:
        sized = Sized.of(config)
        for world_size in sorted({elastic.min_workers, largest}):
            sized.plan(world_size)
    except ConfigError as error:
        return error.line()
    return None
