"""Rank functions of trials that write down what they restored, or train on until something happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from elastic_kfac.config import apply_overrides, parse_config
from elastic_kfac.errors import DataError
from elastic_kfac.experiments.rounds import run_in_rounds
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.loop import run_rank
from elastic_kfac.training.rank import RankTrainer

FILE = "restored-{step:06d}.safetensors"


def records_what_it_restores(config: Any, communicator: Any, *, store: Any, **seams: Any) -> Any:
    """`run_in_rounds`; the live tensors of every restore go to the run's folder."""
    folder = Path(store.storage.path())
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
        return run_in_rounds(config, communicator, store=store, **seams)
    finally:
        RankTrainer.restore = original  # type: ignore[method-assign]


def ends_once_grown(config: Any, communicator: Any, **seams: Any) -> Any:
    """Trains on until there are two ranks, then to the next evaluation; strong damping is an error."""
    if config.kfac.damping > 0.5:
        raise DataError("shard 3 is torn", change="make the shards again")
    if communicator.world_size > 1:
        config = _ending_soon(config)
    return run_rank(config, communicator, **seams)


def second_trial_ends_when_told(config: Any, communicator: Any, *, store: Any, **seams: Any) -> Any:
    """Trains to the next evaluation; trial t001 only once `finish` lies in the search's folder."""
    run = Path(store.storage.path())
    if run.name != "t001" or (run.parents[1] / "finish").exists():
        config = _ending_soon(config)
    return run_rank(config, communicator, store=store, **seams)


def _ending_soon(config: Any) -> Any:
    values = config.model_dump(mode="json")
    changes = [("train.target_accuracy", 0.01), ("train.stop_at_target", True)]
    return parse_config(apply_overrides(values, changes))
