"""From a search space to Ray Tune's own schedulers, searchers and domains."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher as TuneSearcher

from elastic_kfac.errors import UsageError
from elastic_kfac.experiments.search_space import Parameter, SearchSpace, log_scaled
from elastic_kfac.experiments.search_trial import PERTURBED

SCORE = "score"
"""The metric of searchers: `Scoring.score`, smaller is better."""

_MOST_REFUSED_IN_A_ROW = 100

Assignment = Mapping[str, Any]
"""A trial for Ray Tune: `trial` (its id), `stage`, `point` (values by key), `seed`, `screened` (whether
it is the first seed of a searched point, which alone a scheduler may stop)."""


def domain(parameter: Parameter) -> Any:
    """Ray Tune's domain of a parameter."""
    if parameter.values is not None:
        return tune.choice(list(parameter.values))
    assert parameter.interval is not None
    low, high = parameter.interval
    if parameter.kind == "randint":
        return tune.randint(int(low), int(high) + 1)
    return tune.uniform(low, high) if parameter.kind == "uniform" else tune.loguniform(low, high)


def planned_points(space: SearchSpace) -> list[dict[str, Any]]:
    """The points of a grid or random search: the same for the same space and seed."""
    if space.searcher.name == "grid":
        return space.grid_points()
    random = np.random.RandomState(space.searcher.seed)
    domains = {key: domain(parameter) for key, parameter in space.parameters.items()}
    return [
        {key: _plain(each.sample(random_state=random)) for key, each in domains.items()}
        for _ in range(space.num_trials)
    ]


class Screening(ASHAScheduler):
    """ASHA among the first seeds of searched points; it never stops any other trial.

    The other seeds of a point, and the references, end later than the rungs where they would be
    counted, and a point must not lose the one seed that happens to be slow.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Any) -> str:
        """Stops a first seed that is not among the best at its rung."""
        if not _is_screened(trial):
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Any) -> None:
        """Counts the result of a first seed only."""
        if _is_screened(trial):
            super().on_trial_complete(tune_controller, trial, result)
        else:
            self.on_trial_remove(tune_controller, trial)


def _is_screened(trial: Any) -> bool:
    return bool(trial.config["assignment"]["screened"])


def make_scheduler(space: SearchSpace, slots: int) -> TrialScheduler:
    """Ray Tune's scheduler; ASHA and PB2 compare accuracies at equal shares of the budget."""
    if space.scheduler.name == "asha":
        grace = space.scheduler.grace or space.limit / 8
        return Screening(
            time_attr=space.progress_measure,
            metric="best_value",
            mode=space.objective.quality.direction,
            max_t=space.limit,
            grace_period=min(grace, space.limit),
            reduction_factor=space.scheduler.reduction_factor,
        )
    if space.scheduler.name == "pb2":
        from elastic_kfac.experiments.population import Population

        bounds = {
            PERTURBED + key: [log_scaled(parameter, end) for end in parameter.interval or ()]
            for key, parameter in space.perturbed.items()
        }
        return Population(
            slots=slots,
            interval=space.round_length,
            time_attr=space.progress_measure,
            metric="value",
            mode=space.objective.quality.direction,
            hyperparam_bounds=bounds,
            quantile_fraction=space.scheduler.quantile,
        )
    return FIFOScheduler()


def param_space(space: SearchSpace, assignments: Sequence[Assignment]) -> dict[str, Any]:
    """A `param_space` that Ray Tune expands to exactly these trials."""
    found: dict[str, Any] = {"assignment": tune.grid_search([dict(each) for each in assignments])}
    if all(each["stage"] == "search" for each in assignments):
        for key, parameter in space.perturbed.items():
            found[PERTURBED + key] = tune.sample_from(_start_of(key, parameter))
    return found


def _start_of(key: str, parameter: Parameter) -> Callable[[Any], float]:
    def start(config: Any) -> float:
        return log_scaled(parameter, float(config["assignment"]["point"][key]))

    return start


class TrialSource(Protocol):
    """A source of trials and scores for a searcher."""

    def new_point(self, values: Mapping[str, Any]) -> Sequence[Assignment]:
        """Trials of a new point; none if it is refused."""
        ...

    def repeats_due(self) -> Sequence[Assignment] | None:
        """Further seeds that may start now; None if there are none, now or later."""
        ...

    def is_wanted(self, assignment: Assignment) -> bool:
        """Whether a planned trial is still to run."""
        ...

    def score_of(self, assignment: Assignment) -> float | None:
        """The score of a trial's point; None until it is decided."""
        ...


class TrialSearcher(TuneSearcher):
    """Hands trials to Ray Tune as they become known: planned ones, points that Optuna suggests, and
    the other seeds of points whose first seed has finished.
    """

    def __init__(
        self,
        space: SearchSpace,
        source: TrialSource,
        planned: Sequence[Assignment],
        evaluated: Sequence[tuple[Mapping[str, Any], float]] = (),
        num_points: int = 0,
    ) -> None:
        """Starts with the planned trials.

        Args:
            evaluated: Points of an earlier call with their scores.
            num_points: How many points Optuna may still suggest.
        """
        # No metric: a trial's results hold none, only whole points have a score.
        super().__init__()
        self._optuna: Any = None
        if space.searcher.name == "optuna":
            self._optuna = _optuna(space)
            for point, score in evaluated:
                self._optuna.add_evaluated_point(dict(point), score)
        self._source = source
        self._queue = list(planned)
        self._left = num_points
        self._is_closed = False
        self._made = 0
        self._unscored: dict[tuple[tuple[str, str], ...], Assignment] = {}
        self._suggested: dict[tuple[tuple[str, str], ...], str] = {}
        self._lock = threading.Lock()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial for Ray Tune; None while one may become due; `FINISHED` at the end."""
        finished: str = TuneSearcher.FINISHED
        with self._lock:
            if self._is_closed:
                return finished
            self._report_scores()
            due = self._source.repeats_due()
            # First the seeds that decide a point: Optuna learns from them.
            self._queue[:0] = due or ()
            self._queue = [each for each in self._queue if self._source.is_wanted(each)]
            refused = 0
            while not self._queue and self._left > 0 and refused < _MOST_REFUSED_IN_A_ROW:
                self._left -= 1
                self._made += 1
                name = f"point-{self._made}"
                point = self._optuna.suggest(name)
                if not isinstance(point, dict):
                    break
                point = {key: _plain(value) for key, value in point.items()}
                self._suggested[_key(point)] = name
                self._queue.extend(self._source.new_point(point))
                if not self._queue:
                    refused += 1
                    self._optuna.on_trial_complete(name, error=True)
            if not self._queue:
                return finished if due is None else None
            assignment = self._queue.pop(0)
            if assignment["stage"] == "search" and self._optuna is not None:
                self._unscored[_key(assignment["point"])] = assignment
            return {"assignment": dict(assignment)}

    def close(self) -> None:
        """Suggests nothing more."""
        with self._lock:
            self._is_closed = True

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Only whole points count."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Reports the scores of decided points to Optuna."""
        with self._lock:
            self._report_scores()

    def _report_scores(self) -> None:
        # All of them: Ray Tune reports a stopped or failed trial before that is recorded.
        for key, assignment in list(self._unscored.items()):
            score = self._source.score_of(assignment)
            if score is None:
                continue
            del self._unscored[key]
            name = self._suggested.get(key)
            if name is not None:
                self._optuna.on_trial_complete(name, {SCORE: score})
            else:
                # Suggested in an earlier call of the search.
                self._optuna.add_evaluated_point(dict(assignment["point"]), score)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep: a search continues from its folder."""
        Path(checkpoint_path).write_bytes(b"")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: a search continues from its folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray Tune saves a copy with its own files, which is never read.
        return (TuneSearcher, ())


def _optuna(space: SearchSpace) -> Any:
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise UsageError(
            "searcher optuna needs the package optuna",
            change="install it, or use searcher: {name: random}",
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    startup = max(3, min(10, space.num_trials // 3))
    domains = {key: domain(parameter) for key, parameter in space.parameters.items()}
    return OptunaSearch(
        space=OptunaSearch.convert_search_space(domains),
        metric=SCORE,
        mode="min",
        sampler=optuna.samplers.TPESampler(seed=space.searcher.seed, n_startup_trials=startup),
    )


def _key(point: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, repr(value)) for name, value in sorted(point.items()))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
