"""Hooks of a person's own, as `train.hooks` names them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from elastic_kfac.config import Config
from elastic_kfac.data.batch import Batch
from elastic_kfac.training.hooks import Hook


class Noise(Hook):
    """Adds noise that depends on the sample and the epoch, and counts committed steps."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.committed = 0
        self.rows = 0

    def transform(self, batch: Batch, epoch: int) -> Batch:
        draws = torch.from_numpy(self.uniforms(batch, epoch, 1)).to(batch.inputs)
        return replace(batch, inputs=batch.inputs + draws.view(-1, 1, 1, 1))

    def on_point(self, point: str, step: int) -> None:
        self.committed += point == "committed"

    def state_dict(self) -> dict[str, Any]:
        return {"committed": self.committed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.committed = state.get("committed", 0)


class Centred(Hook):
    """A transform that depends on the samples of a batch, which a run refuses."""

    def transform(self, batch: Batch, epoch: int) -> Batch:
        return replace(batch, inputs=batch.inputs - batch.inputs.mean(0))


def no_hook(config: Config) -> object:
    return object()
