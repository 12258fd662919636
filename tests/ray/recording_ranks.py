"""Rank functions of trials: one that writes down what it restored, one that waits for a larger world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from elastic_kfac.config import apply_overrides, parse_config
from elastic_kfac.errors import DataError
from elastic_kfac.training.rank import RankTrainer
from elastic_kfac.training.snapshots import run_rank_with_rescue
from elastic_kfac.training.state import TrainingState

FILE = "restored-{step:06d}.safetensors"


def records_what_it_restores(config: Any, communicator: Any, *, store: Any, **seams: Any) -> Any:
    """`run_rank_with_rescue`; the live tensors of every restore go to the run's folder."""
    folder = Path(store._durable.storage.path())
    original = RankTrainer.restore

    def restore(trainer: RankTrainer, state: TrainingState) -> None:
        original(trainer, state)
        # From the model, the optimizer and K-FAC themselves, not from what was read.
        live = trainer.capture()
        if communicator.rank == 0:
            tensors = {name: tensor.contiguous() for name, tensor in live.tensors.items()}
            save_file(tensors, folder / FILE.format(step=live.progress.step))

    RankTrainer.restore = restore  # type: ignore[method-assign]
    try:
        return run_rank_with_rescue(config, communicator, store=store, **seams)
    finally:
        RankTrainer.restore = original  # type: ignore[method-assign]


def ends_once_grown(config: Any, communicator: Any, **seams: Any) -> Any:
    """Trains on until there are two ranks, then to the next evaluation; strong damping is an error."""
    if config.kfac.damping > 0.5:
        raise DataError("shard 3 is torn", change="make the shards again")
    if communicator.world_size > 1:
        values = config.model_dump(mode="json")
        config = parse_config(apply_overrides(values, [("train.target_accuracy", 0.01)]))
    return run_rank_with_rescue(config, communicator, **seams)
