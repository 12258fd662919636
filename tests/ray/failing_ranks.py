"""Rank functions and hooks that fail on purpose; ranks import them by name."""

from __future__ import annotations

from typing import Any

from elastic_kfac.errors import DataError
from elastic_kfac.training.hooks import Hook


def always_raises(config: Any, communicator: Any, **seams: Any) -> Any:
    """The same defect at every attempt, on one rank only."""
    if communicator.rank == communicator.world_size - 1:
        raise ValueError("a defect of the model")
    communicator.barrier()
    raise AssertionError("the other rank never comes")


def finds_bad_data(config: Any, communicator: Any, **seams: Any) -> Any:
    """What no second attempt can repair."""
    raise DataError("shard 3 is torn", given="train-00003.arrow", change="make the shards again")


class RaisesAtStepThree(Hook):
    """The same defect on every rank, whenever it is reached."""

    def on_point(self, point: Any, step: int) -> None:
        if point == "gradients_exchanged" and step >= 3:
            raise ValueError("a defect of the model")


class FindsBadData(Hook):
    """What no second attempt can repair."""

    def on_start(self, trainer: Any) -> None:
        raise DataError("shard 3 is torn", given="train-00003.arrow", change="make them again")
