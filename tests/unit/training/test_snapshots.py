"""When a survivor may hand over its live state."""

from __future__ import annotations

from typing import get_args

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.training.callbacks import Callback, Point, Trainer
from elastic_kfac.training.rank import RankTrainer
from support.training_problems import KFAC, memory_datasets, small_config


class WhenCommitted(Callback):
    """Notes at every point of a step whether the trainer's state is a committed one."""

    def __init__(self) -> None:
        self.seen: dict[Point, bool] = {}

    def on_start(self, trainer: Trainer) -> None:
        assert isinstance(trainer, RankTrainer)
        self.trainer = trainer

    def on_point(self, point: Point, step: int) -> None:
        self.seen[point] = self.trainer.is_committed


def test_state_is_committed_until_the_factors_change_and_from_the_commit_on() -> None:
    seen = WhenCommitted()
    trainer = RankTrainer(small_config(KFAC), Communicator.solo(), memory_datasets(), callback=seen)
    seen.on_start(trainer)
    assert not trainer.is_committed
    trainer.step()
    trainer.step()
    seen.seen.clear()
    trainer.step()
    assert seen.seen == {
        "step_begin": True,
        "backward_done": True,
        "gradients_exchanged": True,
        "factor_exchange": True,
        "factor_update": False,
        "preconditioned": False,
        "committed": True,
    }
    state = trainer.capture()
    assert trainer.is_committed
    assert set(seen.seen) < set(get_args(Point))
    trainer.restore(state)
    assert not trainer.is_committed
