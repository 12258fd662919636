"""The trials of a search: references, points, further seeds of points, and the confirmation.

A trial that cannot run here is rejected with a reason before it costs anything. Of searched trials that
differ in placement only, the one that the model gives the shortest steps trains for all of them. One that
a finished trial has beaten whatever it still does is pruned (`pruning.py`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elastic_kfac.config import Config
from elastic_kfac.data.manifest import open_named_split
from elastic_kfac.errors import ConfigError
from elastic_kfac.experiments.emulation import (
    PLACEMENT,
    Emulator,
    placed_step_seconds,
    trajectory,
)
from elastic_kfac.experiments.pruning import NOISE, Costs, beaten_by
from elastic_kfac.experiments.search_folder import SearchFolder
from elastic_kfac.experiments.searcher import Assignment, planned_points
from elastic_kfac.experiments.trials import (
    FINISHED,
    PENDING,
    PRUNED,
    REFUSED,
    RUNNING,
    SHARED,
    STOPPED,
    Trial,
)
from elastic_kfac.runs.feasibility import why_infeasible

CONFIRMATION_SEED = 1000
"""Distance of the confirmation's seeds from those of the search."""


_SPENT = {
    "train_time_to_accuracy_s": "train_time_s",
    "time_to_accuracy_s": "train_time_s",
    "steps_to_accuracy": "steps",
    "worker_seconds_to_accuracy": "least_worker_seconds",
    "cpu_seconds_to_accuracy": "cpu_seconds",
}
"""The column of a result that an objective cannot fall below any more, where the target was missed."""

_TRAINED = (PENDING, RUNNING, FINISHED, STOPPED)


class SearchPlan:
    """Adds trials to the table of a search."""

    def __init__(self, folder: SearchFolder, room: int, say: Callable[[str], None]) -> None:
        """`room` is how many workers the cluster can carry; `say` reports rejections."""
        self._folder = folder
        self._space = folder.space
        self._table = folder.trials
        self._room = room
        self._say = say
        emulated = self._space.objective.metric == "emulated_time_to_accuracy_s"
        self.emulator = Emulator(self._space.links) if emulated else None
        """Where seconds are those of links that are not there."""

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
            points = enumerate(planned_points(space))
            found = [self._admit(self._trial_of(n, point)) for n, point in points]
            self._share(found)
            self.prune()
            if all(trial.status == REFUSED for trial in found):
                raise ConfigError(
                    "no point of the search space can run here", given=found[0].reason
                )
        self._folder.write()

    def add_point(self, number: int, values: Mapping[str, Any], repeat: int = 0) -> Trial:
        """Adds one seed of a point."""
        trial = self._admit(self._trial_of(number, values, repeat))
        self._share([trial])
        self.prune([trial])
        return trial

    def _trial_of(self, number: int, values: Mapping[str, Any], repeat: int = 0) -> Trial:
        name = f"t{number:03d}" + (f"-s{repeat}" if self._space.repeats > 1 else "")
        seed = self._space.base.train.seed + repeat
        return Trial(name, str(number), seed, "search", dict(values))

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

    # ---- one training for points that differ in placement only ------------------------------

    def _share(self, added: Sequence[Trial]) -> None:
        """Leaves one trial of each trajectory to train: one that has begun, or else the fastest."""
        if self._space.perturbed or not set(PLACEMENT) & self._space.parameters.keys():
            return
        news = {self._trajectory(trial) for trial in added if trial.status == PENDING}
        groups: dict[str, list[Trial]] = defaultdict(list)
        for trial in self._table.values():
            counts = trial.stage == "search" and trial.status in _TRAINED and not trial.parent
            if counts and (key := self._trajectory(trial)) in news:
                groups[key].append(trial)
        for alike in groups.values():
            if len(alike) < 2:
                continue
            seconds = {trial.id: self._step_seconds(trial) for trial in alike}
            begun = [trial for trial in alike if trial.status != PENDING] or alike
            trained = min(begun, key=lambda trial: seconds[trial.id])
            for trial in alike:
                if trial.status == PENDING and trial is not trained:
                    self._leave_to(trained, trial, seconds)

    def _leave_to(self, trained: Trial, trial: Trial, seconds: Mapping[str, float]) -> None:
        other = trained.parameters
        changed = [key for key, value in trial.parameters.items() if other[key] != value]
        trial.status, trial.parent = SHARED, trained.id
        trial.reason = (
            f"same point as {trained.id}"
            if not changed
            else f"same training as {trained.id}: {', '.join(changed)} changes "
            + (
                "only where and how things are kept, by the model not even seconds"
                if seconds[trial.id] == seconds[trained.id]
                else f"only seconds, by the model {seconds[trial.id] * 1e3:.3g} ms a step against "
                f"{seconds[trained.id] * 1e3:.3g} ms"
            )
        )
        self._say(f"{trial.id} not trained: {trial.reason}")
        if trained.status == FINISHED:
            self.settle_shared(trained)

    def settle_shared(self, trained: Trial) -> None:
        """Gives trials that share a training what it tells about them.

        On emulated links that is all: the steps are the same, and seconds come from the model for every
        placement. Measured seconds are those of the one placement that was trained.
        """
        for trial in self._table.values():
            if trial.parent != trained.id or trial.status != SHARED:
                continue
            trial.note(trained.numbers, "best_value", "steps")
            if self.emulator is None or trained.status != FINISHED:
                continue
            self.note_model(trial)
            trial.status, trial.reached = FINISHED, trained.reached
            trial.run_folder = trained.run_folder
            if trained.reached:
                step_s = self.emulator.step_seconds(self._folder.config_of(trial))
                trial.numbers["objective"] = trained.numbers["steps"] * step_s

    def note_model(self, trial: Trial) -> None:
        """Notes what the model knows of a placement on links that are not there."""
        if self.emulator is not None:
            memory = self.emulator.memory_bytes(self._folder.config_of(trial))
            trial.note({"model_memory_bytes": memory}, "model_memory_bytes")

    # ---- trials that a finished one has beaten ----------------------------------------------

    def prune(self, trials: Sequence[Trial] | None = None) -> None:
        """Ends those of these trials (None: of all) that wait and that a finished one has beaten.

        What has not begun is known by the model alone, on links that are not there.
        """
        if self.emulator is None:
            return
        for trial in list(self._table.values()) if trials is None else trials:
            if trial.status == PENDING and (why := self.why_beaten(trial, trial.numbers)):
                trial.status, trial.reason = PRUNED, why
                self._say(f"{trial.id} pruned: {why}")

    def why_beaten(self, trial: Trial, spent: Mapping[str, Any]) -> str | None:
        """Why a searched trial cannot become better than a finished one in anything; None if it can.

        Args:
            spent: Columns of its last evaluation, which missed the target; empty before the first one.
        """
        space = self._space
        # The median of several seeds may be smaller than the first seed is at any time.
        if not space.prune or space.perturbed or space.repeats > 1 or trial.stage != "search":
            return None
        finished = {
            other.id: self._costs(other)
            for other in self._table.values()
            if other.stage == "search" and other.value is not None
        }
        if not finished:
            return None
        if self.emulator is None:
            return self._beaten_by_now(spent, finished)
        return self._beaten_on_links(trial, spent, finished)

    def _costs(self, trial: Trial) -> Costs:
        get = trial.numbers.get
        if (
            self.emulator is not None
        ):  # all workers are there all the time: hours are the seconds again
            return Costs(trial.numbers["objective"], get("model_memory_bytes"))
        return Costs(trial.numbers["objective"], get("peak_memory_bytes"), get("worker_seconds"))

    def _beaten_by_now(self, spent: Mapping[str, Any], finished: Mapping[str, Costs]) -> str | None:
        """By measured costs: those of the model are estimates, which rule nothing out."""
        objective = spent.get(_SPENT[self._space.objective.metric])
        if objective is None:
            return None
        memory, workers = spent.get("peak_memory_bytes"), spent.get("least_worker_seconds")
        least = Costs(float(objective), memory, workers)
        best = beaten_by(least, finished, NOISE)
        unit = self._space.objective.unit
        return best and self._beaten(best, finished, f"{least.objective:.4g} {unit} are spent")

    def _beaten_on_links(
        self, trial: Trial, spent: Mapping[str, Any], finished: Mapping[str, Costs]
    ) -> str | None:
        """By steps, which are those of every placement that shares the training, and by the model, whose
        seconds are the objective itself."""
        emulator, config = self.emulator, self._folder.config_of(trial)
        assert emulator is not None
        taken, first = int(spent.get("steps") or 0), _steps_to_first_evaluation(config)
        steps = max(taken, first)
        shared = [t for t in self._table.values() if t.status == SHARED and t.parent == trial.id]
        found = []
        for each in (trial, *shared):
            config = self._folder.config_of(each)
            seconds = steps * emulator.step_seconds(config)
            best = beaten_by(Costs(seconds, emulator.memory_bytes(config)), finished)
            if best is None:
                return None
            found.append((best, seconds))
        best, seconds = found[0]
        what = "steps" if taken >= first else "steps to its first evaluation"
        return self._beaten(best, finished, f"{steps} {what} are {seconds:.4g} s by the model")

    def _beaten(self, best: str, finished: Mapping[str, Costs], bound: str) -> str:
        unit = self._space.objective.unit
        return (
            f"cannot beat {best} ({finished[best].objective:.4g} {unit}): {bound} without the "
            "target, and not less memory or worker time"
        )

    def _trajectory(self, trial: Trial) -> str:
        return trajectory(self._folder.config_of(trial))

    def _step_seconds(self, trial: Trial) -> float:
        config = self._folder.config_of(trial)
        if self.emulator is not None:
            return self.emulator.step_seconds(config)
        if not config.kfac.enabled or config.optimizer.name == "sharded_kfac":
            return 0.0
        return placed_step_seconds(config, min(config.elastic.max_workers, self._room))


def _steps_to_first_evaluation(config: Config) -> int:
    """Before which no target is reached, where the batch stays what it is; else 0."""
    if config.batch.policy != "constant" or config.elastic.batch_policy != "keep_global":
        return 0
    split = open_named_split(config.data.shards, config.data.train_split, "data.train_split")
    samples = min(config.train.eval_every_epochs, config.train.epochs) * split.num_samples
    return max(1, math.ceil(samples / config.train.global_batch_size - 1e-6))
