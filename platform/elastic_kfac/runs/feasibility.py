"""Before a run: its placement at any number of ranks, from shapes alone, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic_kfac.config import Config
from elastic_kfac.data.batch import Batch, example, tensors_of, twice
from elastic_kfac.data.columns import Column
from elastic_kfac.data.dataset import check_splits, open_split
from elastic_kfac.data.manifest import open_named_split
from elastic_kfac.errors import ConfigError, DataError, ElasticKfacError
from elastic_kfac.kfac.shapes import plan_of, shapes
from elastic_kfac.placement.costs import LayerShape
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.simulator import Calibration
from elastic_kfac.runs.sample_form import Form, form_of_shape
from elastic_kfac.tasks.choice import make_task
from elastic_kfac.tasks.models import build_model, call_model, evaluating
from elastic_kfac.tasks.preprocessing import Prepare, Preprocessor


@dataclass(frozen=True)
class Sized:
    """A configured model with the shapes that placement depends on."""

    config: Config
    model: nn.Module
    columns: tuple[Column, ...]
    input_shape: tuple[int, ...]
    normalization: tuple[Tensor, Tensor] | None
    layers: tuple[LayerShape, ...]
    """Layers that K-FAC covers, or what one rank owns with `optimizer.name: sharded_kfac`."""

    @classmethod
    def of(
        cls,
        config: Config,
        input_shape: tuple[int, ...] | None = None,
        num_classes: int = 1000,
        *,
        form: Form | None = None,
    ) -> Sized:
        """Builds the model of a configuration.

        Args:
            input_shape: The shape of a sample, (channels, height, width), (features,) or (tokens,),
                where there are no shards to take it and the classes from.
            num_classes: Or tokens of the vocabulary; used with `input_shape` only.
            form: Of samples, instead of both.

        Raises:
            DataError: If the shards, which define the shapes, do not exist.
            ConfigError: If the model is impossible.
        """
        if form is None and input_shape is not None:
            form = form_of_shape(config, input_shape, num_classes)
        if form is None:
            with open_split(config, config.data.train_split) as split:
                columns, input_shape = split.columns, split.input_shape
                normalization = split.normalization
            outputs = None
        else:
            columns, input_shape, outputs, _ = form
            normalization = None
        if outputs is None:
            outputs = make_task(config, columns).num_outputs(columns)
        model = build_model(
            config.model,
            num_outputs=outputs,
            input_shape=input_shape,
            columns=columns,
            seed=config.train.seed,
        )
        sharded = config.optimizer.name == "sharded_kfac"
        has_layers = config.kfac.enabled or sharded
        layers = shapes(model, config.kfac, sharded=sharded) if has_layers else ()
        return cls(config, model, columns, input_shape, normalization, tuple(layers))

    def inputs(self, count: int, prepare: Prepare = lambda batch, epoch: batch) -> Batch:
        """Random samples in the form that the model takes."""
        batch = example(self.columns, self.input_shape, count)
        dtype = next(self.model.parameters()).dtype
        return Preprocessor(self, dtype, torch.device("cpu"), prepare)(batch)

    @property
    def parameter_elements(self) -> int:
        """Parameters of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def loss(self, samples: int) -> Tensor:
        """A scalar of the model's output on random samples, for passes whose values do not matter.

        Raises:
            ConfigError: If the model does not take samples of this shape.
        """
        try:
            outputs = tensors_of(call_model(self.model, self.inputs(samples).inputs))
            return torch.stack([output.logsumexp(1).mean() for output in outputs]).sum()
        except ElasticKfacError:
            raise
        except Exception as error:
            line = str(error).strip().splitlines() or [""]
            raise ConfigError(
                f"the model fails on random samples: {type(error).__name__}: {line[0]}",
                given=f"model.name={self.config.model.name}, samples of shape "
                f"{'x'.join(map(str, self.input_shape))}",
                change="give the shape of a sample that the model takes",
            ) from error

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
    """Tries model and loss on two random samples, and makes the smallest and the largest plan, so that
    what does not fit is found before a cluster starts.

    Raises:
        DataError: As `Sized.of`.
        ConfigError: If model, loss and data do not fit, the loss is no sum over samples, the batch is
            larger than the data, or a plan exceeds the memory budget.
    """
    check_splits(config)
    check_batch(config)
    sized = Sized.of(config)
    if config.plan.memory_budget_gib is not None and sized.layers:
        for world_size in {config.elastic.min_workers, config.elastic.max_workers}:
            sized.plan(world_size)
    model, task = sized.model, make_task(config, sized.columns)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(model):
        batch = sized.inputs(2, lambda batch, epoch: task.prepare(batch, config.train.seed, epoch))
        inputs, targets = batch.inputs, batch.targets
        try:
            outputs = call_model(model, inputs)
            task.correct(outputs, targets)
            task.sums(outputs, targets)
            task.records(outputs, targets)
            loss = task.loss(outputs, targets)
            doubled = task.loss(twice(outputs, 2), twice(targets, 2))
            values = [float(loss), float(doubled)]
        except ElasticKfacError:
            raise
        except Exception as error:
            line = str(error).strip().splitlines() or [""]
            name, own = config.task.name, f"task.name={config.task.name}"
            raise ConfigError(
                f"model and loss fail on a batch of samples: {type(error).__name__}: {line[0]}",
                given=f"model.name={config.model.name}, "
                f"{f'train.loss={config.train.loss}' if name == 'classification' else own}, "
                f"inputs {[list(tensor.shape) for tensor in tensors_of(inputs)]}",
                change="try model and loss on one batch of the data",
            ) from error
    if values[0] > 0 and abs(values[1] / values[0] - 2) > 0.1:
        raise ConfigError(
            "train.loss is not a sum over samples: the same samples twice must double it",
            given=f"{values[0]:.4g}, and {values[1]:.4g} for the same samples twice",
            change='return the sum, for example with reduction="sum"',
        )


def check_batch(config: Config) -> None:
    """Raises ConfigError if the global batch is larger than the training split."""
    split = open_named_split(config.data.shards, config.data.train_split, "data.train_split")
    if config.train.global_batch_size > split.num_samples:
        raise ConfigError(
            "train.global_batch_size is larger than the training split",
            given=config.train.global_batch_size,
            allowed=f"up to {split.num_samples} samples",
            change="lower it, or train on more data",
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
    try:
        check_batch(config)
        if config.plan.memory_budget_gib is None or not has_state:
            return None
        sized = Sized.of(config)
        for world_size in sorted({elastic.min_workers, largest}):
            sized.plan(world_size)
    except (ConfigError, DataError) as error:
        return error.line()
    return None
