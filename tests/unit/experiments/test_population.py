"""Rounds of a population without a cluster: who waits, who clones whom, and that every round ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import Checkpoint
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.schedulers.pb2 import PB2

from elastic_kfac.experiments.population import Population
from elastic_kfac.experiments.rounds import RoundGate, announce_round, is_over, round_after
from elastic_kfac.state.run_folder import RunFolder

LR = "perturbed:optimizer.lr"


class Tune:
    """Ray Tune's loop around trials whose accuracy is what `accuracy` says at an epoch."""

    def __init__(self, count: int, *, slots: int, epochs: int, interval: float = 2.0) -> None:
        self.scheduler = Population(
            slots=slots,
            interval=interval,
            time_attr="epoch",
            metric="accuracy",
            mode="max",
            hyperparam_bounds={LR: [-3.0, 0.0]},
            quantile_fraction=0.25,
            log_config=False,
        )
        self.epochs = epochs
        self.epoch = dict.fromkeys((f"t{n}" for n in range(count)), 0)
        self.fails_at: dict[str, int] = {}
        self.most_running = 0
        self.turns: list[str] = []
        self.starts = [-0.5 - n / count for n in range(count)]
        self.trials = [self._trial(f"t{n}", start) for n, start in enumerate(self.starts)]
        for trial in self.trials:
            self.scheduler.on_trial_add(SimpleNamespace(search_alg=None), trial)

    def _trial(self, name: str, lr: float) -> Trial:
        assignment = {"trial": name, "stage": "search", "seed": 0, "point": {"batch": name}}
        config = {"assignment": assignment, LR: lr}
        return Trial("trial", stub=True, trial_id=name, config=config)

    def get_trials(self) -> list[Trial]:
        return self.trials

    def run(self) -> None:
        """Until all have ended; each chosen trial evaluates once an epoch."""
        for _ in range(1000):
            while (trial := self.scheduler.choose_trial_to_run(self)) is not None:
                self.turns.append(trial.trial_id)
                given = trial.latest_checkpoint_result
                if given is not None:
                    self.epoch[trial.trial_id] = given.metrics["epoch"]
                trial.set_status(Trial.RUNNING)
            running = [trial for trial in self.trials if trial.status == Trial.RUNNING]
            self.most_running = max(self.most_running, len(running))
            if not running:
                return
            for trial in running:
                self._one_epoch(trial)
        raise AssertionError("it does not end")

    def _one_epoch(self, trial: Trial) -> None:
        name = trial.trial_id
        self.epoch[name] += 1
        epoch = self.epoch[name]
        if self.fails_at.get(name) == epoch:
            trial.set_status(Trial.ERROR)
        elif epoch == self.epochs:
            trial.set_status(Trial.TERMINATED)
        else:
            result = {"epoch": float(epoch), "accuracy": epoch * (2 - abs(trial.config[LR]))}
            decision = self.scheduler.on_trial_result(self, trial, result)
            if decision == TrialScheduler.PAUSE:
                saved = SimpleNamespace(checkpoint=Checkpoint(f"/{name}/{epoch}"), metrics=result)
                trial.run_metadata.checkpoint_manager._latest_checkpoint_result = saved
                trial.set_status(Trial.PAUSED)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_worst_takes_the_state_and_values_of_the_best_and_keeps_its_name(slots: int) -> None:
    tune = Tune(4, slots=slots, epochs=4)
    tune.run()
    assert [trial.status for trial in tune.trials] == [Trial.TERMINATED] * 4
    assert tune.most_running == slots
    assert sorted(tune.turns) == sorted([f"t{n}" for n in range(4)] * 2)
    best, *_, worst = tune.trials
    assert worst.latest_checkpoint_result.checkpoint.path == "/t0/2"
    own = {"trial": "t3", "stage": "search", "seed": 0}
    assert worst.config["assignment"] == {**own, "point": {"batch": "t0"}}
    # Nothing is known of what values do before the second round.
    assert worst.config[LR] == best.config[LR] == tune.starts[0]
    for trial in tune.trials[:3]:
        assert trial.config["assignment"]["point"] == {"batch": trial.trial_id}


def test_model_proposes_values_inside_the_bounds_from_the_second_round_on() -> None:
    tune = Tune(4, slots=4, epochs=9)
    tune.run()
    assert [trial.status for trial in tune.trials] == [Trial.TERMINATED] * 4
    assert tune.scheduler._num_perturbations == 4
    values = [trial.config[LR] for trial in tune.trials]
    assert set(values) - set(tune.starts)
    assert all(-3.0 <= value <= 0.0 for value in values)


def test_round_does_not_wait_for_a_trial_that_failed_or_that_ended() -> None:
    for epoch in (1, 2, 3, 4):
        tune = Tune(3, slots=1, epochs=7)
        tune.fails_at = {"t0": epoch}
        tune.run()
        ended = [trial.status for trial in tune.trials]
        assert ended == [Trial.ERROR, Trial.TERMINATED, Trial.TERMINATED]


def test_rounds_shorter_than_the_evaluations_apart_end_too() -> None:
    tune = Tune(2, slots=1, epochs=5, interval=0.5)
    tune.run()
    assert [trial.status for trial in tune.trials] == [Trial.TERMINATED] * 2


def test_continued_trials_are_compared_at_the_same_point() -> None:
    tune = Tune(2, slots=2, epochs=9)
    result = {"epoch": 6.0, "accuracy": 0.5, "round_end": 6.0}
    assert tune.scheduler.on_trial_result(tune, tune.trials[0], result) == "PAUSE"
    behind = {"epoch": 4.0, "accuracy": 0.5, "round_end": 4.0}
    assert tune.scheduler.on_trial_result(tune, tune.trials[1], behind) == "CONTINUE"


def test_equal_members_do_not_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def singular(*arguments: Any) -> Any:
        raise ValueError("singular matrix")

    monkeypatch.setattr(PB2, "_get_new_config", singular)
    tune = Tune(2, slots=2, epochs=4)
    tune.run()
    assert tune.trials[1].config[LR] == tune.trials[0].config[LR]
    assert tune.trials[1].config["assignment"]["trial"] == "t1"


@pytest.mark.parametrize(
    ("progress", "interval", "end"),
    [(0.0, 2.0, 2.0), (1.9, 2.0, 2.0), (2.0, 2.0, 4.0), (0.1 + 0.2, 0.1, 0.4), (7.5, 2.0, 8.0)],
)
def test_round_after_is_the_next_multiple(progress: float, interval: float, end: float) -> None:
    assert round_after(progress, interval) == pytest.approx(end)
    assert not is_over(progress, round_after(progress, interval))


class _Control:
    def __init__(self) -> None:
        self.asked = 0
        self.reason: str | None = None

    def stop_reason(self) -> str | None:
        self.asked += 1
        return self.reason if self.asked > 3 else None


def test_rank_waits_after_the_evaluation_that_ends_the_round(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    control, rounds = _Control(), iter([("epoch", 2.0), ("epoch", 2.0), ("epoch", 4.0)])
    gate = RoundGate(control, lambda: next(rounds), poll_s=0)
    trainer: Any = SimpleNamespace(
        progress=SimpleNamespace(evaluations=0, train_time_s=9.0), fractional_epoch=1.0
    )
    gate.on_start(trainer)
    assert gate.stop_reason() is None
    trainer.fractional_epoch = 2.0
    # Not before it has been evaluated there.
    assert gate.stop_reason() is None
    assert control.asked == 2
    trainer.progress.evaluations = 1
    # Until another round is announced, or until it is asked to stop.
    assert gate.stop_reason() is None
    assert list(rounds) == []
    stopped = RoundGate(control, lambda: ("train_time_s", 8.0), poll_s=0)
    stopped.on_start(trainer)
    control.asked, control.reason = 0, "Ray Tune takes a checkpoint"
    assert stopped.stop_reason() is None
    trainer.progress.evaluations = 2
    assert stopped.stop_reason() == "Ray Tune takes a checkpoint"
    announce_round(folder, "epoch", 2.5)
    assert (tmp_path / "round.json").read_text() == '{"measure": "epoch", "end": 2.5}'
