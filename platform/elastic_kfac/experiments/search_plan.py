"""The trials of a search: references, points, further seeds of points, and the confirmation.

A trial that cannot run here is rejected with a reason before it costs anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from elastic_kfac.errors import ConfigError
from elastic_kfac.experiments.search_folder import SearchFolder
from elastic_kfac.experiments.searcher import Assignment, planned_points
from elastic_kfac.experiments.trials import FINISHED, PENDING, REFUSED, Trial
from elastic_kfac.runs.feasibility import why_infeasible

CONFIRMATION_SEED = 1000
"""Distance of the confirmation's seeds from those of the search."""


class SearchPlan:
    """Adds trials to the table of a search."""

    def __init__(self, folder: SearchFolder, room: int, say: Callable[[str], None]) -> None:
        """`room` is how many workers the cluster can carry; `say` reports rejections."""
        self._folder = folder
        self._space = folder.space
        self._table = folder.trials
        self._room = room
        self._say = say

    def begin(self) -> None:
        """Adds every trial that is known before the search begins.

        Raises:
            ConfigError: If none of the planned points can run here.
        """
        space = self._space
        for name, point in space.references.items():
            values = {**space.default_point(), **point}
            shown = {key: values[key] for key in space.parameters}
            for repeat in range(space.repeats):
                seed = space.base.train.seed + repeat
                self._admit(Trial(f"{name}-s{repeat}", name, seed, "reference", shown))
        if space.searcher.name != "optuna":
            found = [self.add_point(n, point) for n, point in enumerate(planned_points(space))]
            if all(trial.status == REFUSED for trial in found):
                raise ConfigError(
                    "no point of the search space can run here", given=found[0].reason
                )
        self._folder.write()

    def add_point(self, number: int, values: Mapping[str, Any], repeat: int = 0) -> Trial:
        """Adds one seed of a point."""
        name = f"t{number:03d}" + (f"-s{repeat}" if self._space.repeats > 1 else "")
        seed = self._space.base.train.seed + repeat
        return self._admit(Trial(name, str(number), seed, "search", dict(values)))

    def add_repeats(self) -> list[Trial]:
        """Adds the other seeds of points whose first has finished."""
        added = []
        for first in self._folder.first_seeds():
            if first.status == FINISHED:
                known = len(self._table.of("search", first.point))
                for repeat in range(known, self._space.repeats):
                    added.append(self.add_point(int(first.point), first.parameters, repeat))
        return added

    def add_confirmation(self, best: Trial) -> None:
        """Adds the winner and the references once more, with seeds that the search did not use."""
        space, table = self._space, self._table
        points: dict[str, Mapping[str, Any]] = {"best": best.parameters}
        for name in space.references:
            points[name] = table.of("reference", name)[0].parameters
        # A continued search may have found another winner: its confirmation is a new one.
        for trial in table.of("confirm", "confirm-best"):
            if trial.parameters != best.parameters:
                del table[trial.id]
        for repeat in range(space.confirm):
            seed = space.base.train.seed + CONFIRMATION_SEED + repeat
            for name, point in points.items():
                trial_id, point_name = f"confirm-{name}-s{repeat}", f"confirm-{name}"
                self._admit(Trial(trial_id, point_name, seed, "confirm", dict(point)))

    def points_left(self) -> int:
        """Points that Optuna may still suggest; other searchers plan them before the search begins."""
        if self._space.searcher.name != "optuna":
            return 0
        return max(0, self._space.num_trials - len(self._folder.first_seeds()))

    def waiting(self) -> int:
        """How many trials will still want workers."""
        trials = self._table.values()
        waiting = sum(trial.status == PENDING for trial in trials)
        if self._space.perturbed:
            # Members of a population take turns.
            waiting = sum(t.stage != "confirm" and not t.ended for t in trials) - 1
        # Further seeds of a point take the place that their first one leaves.
        return max(0, waiting + self.points_left())

    def assignment(self, trial: Trial) -> Assignment:
        """A trial for Ray Tune."""
        return {
            "trial": trial.id,
            "stage": trial.stage,
            "point": self._folder.values_of(trial),
            "seed": trial.seed,
            "screened": trial.stage == "search" and trial.seed == self._space.base.train.seed,
        }

    def _admit(self, planned: Trial) -> Trial:
        trial = self._table.add(planned)
        if trial.ended:
            return trial
        try:
            reason = why_infeasible(self._folder.config_of(trial), self._room)
        except ConfigError as error:
            reason = error.line()
        if reason is not None:
            trial.status, trial.reason = REFUSED, reason
            self._say(f"{trial.id} rejected: {reason}")
        return trial
