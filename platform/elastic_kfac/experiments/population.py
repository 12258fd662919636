"""Ray Tune's PB2 for trials that are nested runs: rounds that always end, and clones that are clones.

Population Based Bandits (Parker-Holder et al., 2020): at the end of every round the worst part of a
population takes over the state of the best part, with values that a Gaussian process proposes.

Ray Tune's own synchronous rounds compare the trials that have been created so far, wait for ever for a
trial that has failed or ended, and give a clone the donor's whole configuration, which here includes its
name. So this class keeps the rounds: a trial that reaches the end of a round is paused, and once all
that are still alive are paused there, states change hands. The model behind the proposals, the choice
of donors and the exchange itself are Ray Tune's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.schedulers.pb2 import PB2

from elastic_kfac.experiments.rounds import is_over, round_after


class Population(PB2):
    """PB2 over trials of which `slots` train at the same time."""

    def __init__(self, *, slots: int, interval: float, **options: Any) -> None:
        """`interval` is the length of a round in units of `time_attr`; `options` are those of PB2."""
        super().__init__(perturbation_interval=interval, synch=True, **options)
        self._slots = slots
        self._interval = interval
        self._end = interval

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """A member of the population, created before any of them trains."""
        super().on_trial_add(tune_controller, trial)
        # Ray Tune starts every pending trial by itself; a paused one only when it is chosen.
        trial.set_status(Trial.PAUSED)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        """Pauses a trial at the first evaluation at the end of the round."""
        time = float(result[self._time_attr])
        # A continued search finds its trials further on than at the first round.
        self._end = max(self._end, float(result.get("round_end") or 0.0))
        if not is_over(time, self._end):
            return str(TrialScheduler.CONTINUE)
        self._save_trial_state(self._trial_state[trial], time, dict(result), trial)
        return str(TrialScheduler.PAUSE)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The trial with the least progress among those that the round still waits for."""
        alive = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
        if alive and all(self._waits(trial) for trial in alive):
            self._end_round(tune_controller, alive)
        starting = [trial for trial in alive if trial.status == Trial.PENDING]
        running = [trial for trial in alive if trial.status == Trial.RUNNING]
        if starting or len(running) >= self._slots:
            return starting[0] if starting else None
        paused = [t for t in alive if t.status == Trial.PAUSED and not self._waits(t)]
        return min(paused, key=self._time_of, default=None)

    def _time_of(self, trial: Trial) -> float:
        return float(self._trial_state[trial].last_train_time)

    def _waits(self, trial: Trial) -> bool:
        return bool(trial.status == Trial.PAUSED and is_over(self._time_of(trial), self._end))

    def _end_round(self, tune_controller: Any, alive: list[Trial]) -> None:
        lower, upper = self._quantiles()
        # Donors first: the others take the states that these save.
        for trial in [*upper, *lower]:
            self._checkpoint_or_exploit(trial, tune_controller, upper, lower)
        self._end = round_after(max(self._time_of(trial) for trial in alive), self._interval)

    def _get_new_config(
        self, trial: Trial, trial_to_clone: Trial
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        own, given = trial.config["assignment"], trial_to_clone.config["assignment"]
        with warnings.catch_warnings():
            # A fit that does not converge still proposes; and Ray's calls of SciPy are not ours.
            warnings.simplefilter("ignore")
            try:
                config, operations = super()._get_new_config(trial, trial_to_clone)
            except (ValueError, np.linalg.LinAlgError):
                # Equal members make the model singular: this clone keeps the donor's values.
                config, operations = dict(trial_to_clone.config), {}
        # Values that do not change in training go with the state that was trained with them.
        return {**config, "assignment": {**own, "point": given["point"]}}, operations
