"""Rank functions that fail on purpose; ranks import them by name."""

from __future__ import annotations

from typing import Any

from elastic_kfac.errors import DataError


def always_raises(config: Any, communicator: Any, **seams: Any) -> Any:
    """The same defect at every attempt, on one rank only."""
    if communicator.rank == communicator.world_size - 1:
        raise ValueError("a defect of the model")
    communicator.barrier()
    raise AssertionError("the other rank never comes")


def finds_bad_data(config: Any, communicator: Any, **seams: Any) -> Any:
    """What no second attempt can repair."""
    raise DataError("shard 3 is torn", given="train-00003.arrow", change="make the shards again")
