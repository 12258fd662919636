"""A person's own code in a run: `train.hooks: [package.module:factory]`.

    class Noise(Hook):
        def transform(self, batch, epoch):
            draws = self.uniforms(batch, epoch, draws=1)         # of the seed, the epoch and the sample
            noisy = batch.inputs + 0.1 * torch.from_numpy(draws).to(batch.inputs)
            return replace(batch, inputs=noisy)

        def on_metrics(self, row):                               # rank 0: a row of metrics.jsonl
            print(row)

A factory is called as `factory(config)` in every worker. What it returns is also a `Callback`, whose
methods follow the run. An exception in a hook ends the run.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

from elastic_kfac.data.batch import Batch, tensors_of
from elastic_kfac.data.order import stream_key, uniforms
from elastic_kfac.errors import ConfigError
from elastic_kfac.tasks.imports import load_reference
from elastic_kfac.training.callbacks import Callback

if TYPE_CHECKING:
    from elastic_kfac.config import Config


class Hook(Callback):
    """Base of hooks; every method does nothing unless overridden."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def transform(self, batch: Batch, epoch: int) -> Batch:
        """Training samples on their device, normalised, before attacks, mixing and erasing.

        The result for a sample must depend on the sample, the epoch and `uniforms` only, not on which
        samples share the batch: the batches of a worker change with the number of workers. This is
        checked at the start of a run. `batch.ids`, the order and the number of samples stay.
        """
        return batch

    def uniforms(self, batch: Batch, epoch: int, draws: int) -> npt.NDArray[Any]:
        """Random numbers in [0, 1), float64 [n, draws], equal for any number of workers and after a
        restart; each class of hooks has its own."""
        name = zlib.crc32(type(self).__qualname__.encode())
        return uniforms(stream_key(self.config.train.seed, epoch, name), batch.ids, draws)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, dicts and lists that a resumed run needs; must be equal on all
        ranks, so it may not depend on what only rank 0 sees."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`; an empty one is that of a run without this hook."""


class Hooks:
    """The hooks of a run as one."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = tuple(hooks)

    @classmethod
    def of(cls, config: Config) -> Hooks:
        """The hooks that a configuration names.

        Raises:
            ConfigError: If one cannot be imported or is no `Hook`.
        """
        found = []
        for reference in config.train.hooks:
            hook = load_reference(reference, key="train.hooks")(config)
            if not isinstance(hook, Hook):
                raise ConfigError(
                    "train.hooks: the factory returned no elastic_kfac.training.hooks.Hook",
                    given=f"{reference} -> {type(hook).__name__}",
                )
            found.append(hook)
        return cls(found)

    def transform(self, batch: Batch, epoch: int) -> Batch:
        """Every transform in turn."""
        for hook in self.hooks:
            batch = hook.transform(batch, epoch)
        return batch

    def check(self, batch: Batch) -> None:
        """Transforms some samples together and one by one.

        Raises:
            ConfigError: If the results differ, or have other samples.
        """
        for hook in self.hooks:
            if type(hook).transform is Hook.transform or len(batch) < 2:
                continue
            together = hook.transform(_copy(batch), 0)
            alone = [
                hook.transform(_copy(batch.part(slice(i, i + 1))), 0) for i in range(len(batch))
            ]
            if len(together) == len(batch) and all(
                _equal(together.part(slice(i, i + 1)), one) for i, one in enumerate(alone)
            ):
                continue
            raise ConfigError(
                "train.hooks: the transform of a sample depends on the samples beside it",
                given=type(hook).__qualname__,
                change="draw with self.uniforms(batch, epoch, draws), and compute row by row",
            )

    def state_dict(self) -> dict[str, Any]:
        return {f"{i} {type(h).__qualname__}": h.state_dict() for i, h in enumerate(self.hooks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, hook in enumerate(self.hooks):
            hook.load_state_dict(state.get(f"{index} {type(hook).__qualname__}", {}))


def _copy(batch: Batch) -> Batch:
    # A transform may work in place.
    return Batch(batch.inputs.clone(), batch.targets.clone(), batch.ids.copy(), batch.weights)


def _equal(one: Batch, other: Batch) -> bool:
    pairs = [
        pair
        for a, b in ((one.inputs, other.inputs), (one.targets, other.targets))
        for pair in zip(tensors_of(a), tensors_of(b), strict=True)
    ]
    return one.ids.tolist() == other.ids.tolist() and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
        for a, b in pairs
    )
