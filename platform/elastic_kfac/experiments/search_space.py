"""A search space: parameters, objective and budget of a search.

    base: ../jobs/configs/digits.yaml          # relative to this file
    set: {train.global_batch_size: 64}         # of every trial
    parameters:
      kfac.damping: {loguniform: [1.0e-4, 1.0e-1]}
      kfac.inverse_update_steps: {choice: [5, 10, 50]}
    objective: {target_accuracy: 0.95}
    budget: {epochs: 10}

Everything is checked against the configuration model before anything starts.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from elastic_kfac.config import (
    Config,
    Section,
    apply_overrides,
    parse_config,
    read_config,
    read_yaml,
    split_override,
    validate,
)
from elastic_kfac.config.shipped import find_config
from elastic_kfac.config.train import Target
from elastic_kfac.errors import ConfigError
from elastic_kfac.experiments.trials import Scoring
from elastic_kfac.observability.quality import Quality, quality_of, reached_s
from elastic_kfac.paths import user_path

Point = Mapping[str, Any]
"""One value for every parameter, by `section.key`."""

METRICS = {
    "train_time_to_accuracy_s": "training seconds",
    "time_to_accuracy_s": "wall-clock seconds",
    "steps_to_accuracy": "steps",
    "worker_seconds_to_accuracy": "worker seconds",
    "cpu_seconds_to_accuracy": "CPU seconds",
    "emulated_time_to_accuracy_s": "seconds on emulated links",
}
"""Metrics to minimise, with units; `training` seconds leave out evaluation and downtime."""

OWNED = {
    "train.seed": "repeats",
    "train.epochs": "budget.epochs",
    "train.target_accuracy": "objective.target_accuracy",
    "train.target": "objective.target",
    "train.stop_at_target": "objective",
}
"""Keys that the search itself sets, with the key of the space that controls them."""


MAX_POINTS = 10_000

_REFERENCE = r"(?!best$|confirm-|t\d+$)[A-Za-z0-9][\w.-]{0,99}"
"""Names of references: folders of trials are named after them, beside those of other trials."""


class Parameter(Section):
    """The values of a parameter; exactly one of the five."""

    choice: tuple[Any, ...] | None = Field(default=None, min_length=1)
    grid: tuple[Any, ...] | None = Field(default=None, min_length=1)
    """Every value, combined with those of every other grid."""
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    randint: tuple[int, int] | None = None
    """Both ends included."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_kind(cls, given: Any) -> Any:
        if not isinstance(given, dict | Parameter):
            raise ValueError("a kind with its values, such as {choice: [0.1, 0.2]}")
        return given

    @model_validator(mode="after")
    def _exactly_one(self) -> Parameter:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"needs exactly one of {', '.join(type(self).model_fields)}, has {len(given)}"
            )
        return self

    @model_validator(mode="after")
    def _distinct(self) -> Parameter:
        values = self.values or ()
        for place, value in enumerate(values):
            if value in values[:place]:
                raise ValueError(f"different values; {self.kind} has {value!r} twice")
        return self

    @model_validator(mode="after")
    def _ordered(self) -> Parameter:
        if self.interval is not None:
            low, high = self.interval
            if low >= high:
                raise ValueError(f"{self.kind} {low} to {high} is empty")
            if self.kind == "loguniform" and low <= 0:
                raise ValueError(f"loguniform needs bounds above 0, not {low}")
        return self

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def values(self) -> tuple[Any, ...] | None:
        """The values of a discrete parameter."""
        return self.choice if self.choice is not None else self.grid

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of an interval."""
        return self.uniform or self.loguniform or self.randint

    def probes(self) -> tuple[Any, ...]:
        """Values to check in place of all: the ends and, for reals, one in between."""
        if self.values is not None:
            return self.values
        assert self.interval is not None
        low, high = self.interval
        if self.kind == "randint":
            return (int(low), int(high))
        return (low, low + (high - low) * 0.38196601, high)


class Objective(Section):
    """The metric to minimise."""

    metric: Literal[
        "train_time_to_accuracy_s",
        "time_to_accuracy_s",
        "steps_to_accuracy",
        "worker_seconds_to_accuracy",
        "cpu_seconds_to_accuracy",
        "emulated_time_to_accuracy_s",
    ] = "train_time_to_accuracy_s"
    target: Target | None = None
    """Metric and value that a trial must reach (`train.target`)."""
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Short for `target: {metric: accuracy, value: …}`."""
    direction: Literal["max", "min"] | None = None
    """Whether larger or smaller values of a person's own metric are better."""
    censored: Literal["by_distance", "equal"] = "by_distance"
    """How trials that miss the target rank behind all that reach it: by the accuracy they lack, or
    all alike."""

    @model_validator(mode="after")
    def _has_one_target(self) -> Objective:
        if (self.target is None) == (self.target_accuracy is None):
            raise ValueError("give one of target and target_accuracy")
        return self

    @property
    def goal(self) -> Target:
        """The target, however it was written."""
        return self.target or Target(value=self.target_accuracy or 0.0)

    @property
    def quality(self) -> Quality:
        """The metric of the target."""
        found = quality_of(self.goal.metric, self.direction or "max")
        return found._replace(direction=self.direction or found.direction)

    @property
    def shown_target(self) -> str:
        """The target as people read it."""
        value = f"{self.goal.value:.4g}"
        return value if self.goal.metric == "accuracy" else f"{self.quality.label} {value}"

    @property
    def unit(self) -> str:
        """Unit of the metric in words."""
        return METRICS[self.metric]

    @property
    def scoring(self) -> Scoring:
        """The order of trials."""
        return Scoring(self.goal.value, self.censored, self.quality.direction)

    @property
    def censoring_rule(self) -> str:
        """The order of trials in one sentence."""
        by_distance = f"by how far their best {self.quality.label} is from it"
        if self.goal.metric == "accuracy":
            by_distance = "by how far their best accuracy is below it"
        how = by_distance if self.censored == "by_distance" else "all alike"
        return (
            f"Trials that reach {self.shown_target} rank by {self.unit}; those that do not "
            f"(budget used up, stopped early or failed) rank behind all of them, {how}, and are "
            "never given a time."
        )

    def value_of(self, result: Mapping[str, Any]) -> float | None:
        """The metric of a run that reached its target, from `result.json`; None if it did not.

        Args:
            result: Also holds `cpu_seconds` and `emulated_step_s`, where they are known.
        """
        if reached_s(result) is None:
            return None
        if self.metric == "emulated_time_to_accuracy_s":
            step_s = result.get("emulated_step_s")
            return None if step_s is None else float(result["steps"]) * float(step_s)
        column = {
            "steps_to_accuracy": "steps",
            "worker_seconds_to_accuracy": "worker_seconds",
            "cpu_seconds_to_accuracy": "cpu_seconds",
        }.get(self.metric, self.metric)
        value = result.get(column.replace("_to_accuracy_s", "_to_target_s"), result.get(column))
        return None if value is None else float(value)


class Links(Section):
    """The cluster that `emulated_time_to_accuracy_s` emulates."""

    world_size: Annotated[int, Field(ge=2)] = 16
    ranks_per_node: Annotated[int, Field(ge=1)] = 1
    latency_s: Annotated[float, Field(gt=0)] = 50e-6
    gbit_per_s: Annotated[float, Field(gt=0)] = 10.0


class Budget(Section):
    """The limit of one trial; it ends sooner when it reaches the target."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    train_seconds: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        if (self.epochs is None) == (self.train_seconds is None):
            raise ValueError("needs exactly one of epochs and train_seconds")
        return self


class Scheduler(Section):
    """Ray Tune's schedulers: which trials stop early, and which continue another trial's state."""

    name: Literal["none", "asha", "pb2"] = "none"
    grace: Annotated[float, Field(gt=0)] | None = None
    """ASHA: earliest stop, in units of the budget; None is an eighth of it."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3
    """ASHA: at every rung one in this many trials continues."""
    interval: Annotated[float, Field(gt=0)] | None = None
    """PB2: between two exploits, in units of the budget; None is a quarter of it."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """PB2: the worst trials, this share of the population, take the state of the best."""


class Searcher(Section):
    """Ray Tune's searchers."""

    name: Literal["random", "grid", "optuna"] = "random"
    seed: Annotated[int, Field(ge=0)] = 0


def _only_default() -> dict[str, dict[str, Any]]:
    return {"default": {}}


class SearchSpace(Section):
    """A whole search, resolved: `base` holds every configuration key."""

    base: Config = Config()
    parameters: dict[str, Parameter] = Field(min_length=1)
    objective: Objective
    budget: Budget
    links: Links = Links()
    scheduler: Scheduler = Scheduler()
    searcher: Searcher = Searcher()
    num_trials: Annotated[int, Field(ge=1, le=MAX_POINTS)] = 8
    """Points to try (PB2: size of the population); unused for a grid."""
    repeats: Annotated[int, Field(ge=1)] = 1
    """Seeds per point; the median counts, of an even number the worse of the two in the middle. The
    first seed runs alone; the others follow when it has finished, and no scheduler stops those."""
    references: dict[str, dict[str, Any]] = Field(default_factory=_only_default)
    """Points outside the search to compare with; `default: {}` is the base itself."""
    confirm: Annotated[int, Field(ge=0)] = 0
    """Seeds, unseen by the search, with which the winner and the references run once more."""
    max_concurrent: Annotated[int, Field(ge=1)] = 1
    """Trials at the same time; 1 keeps their clocks comparable on a small machine."""
    prune: bool = True
    """Whether a trial ends once a finished one has beaten it in everything that the report weighs, and
    does not begin where that is sure before (`repeats: 1` only)."""
    keep_states: bool = False
    """Whether searched trials that lost keep their checkpoints; those of the best are always kept."""

    @model_validator(mode="after")
    def _references_are_named(self) -> SearchSpace:
        for name in self.references:
            if re.fullmatch(_REFERENCE, name, re.ASCII) is None:
                raise ValueError(
                    "letters, digits, '.', '_' and '-' as names of references, other than best, "
                    f"confirm-… and t000, not {name!r}"
                )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> SearchSpace:
        kinds = {key: parameter.kind for key, parameter in self.parameters.items()}
        if self.searcher.name == "grid":
            for key, kind in kinds.items():
                if kind not in ("grid", "choice"):
                    raise ValueError(f"searcher grid needs grid or choice, {key} has {kind}")
            points = math.prod(len(p.values or ()) for p in self.parameters.values())
            if points > MAX_POINTS:
                raise ValueError(f"up to {MAX_POINTS:,} points, the grid has {points:,}")
        else:
            for key, kind in kinds.items():
                if kind == "grid":
                    raise ValueError(f"{key} is a grid, which needs searcher: {{name: grid}}")
        if self.scheduler.name == "pb2":
            if self.searcher.name != "random" or self.repeats != 1:
                raise ValueError("scheduler pb2 goes with searcher random and repeats 1")
            if not {"uniform", "loguniform"} & set(kinds.values()):
                raise ValueError("scheduler pb2 needs a uniform or loguniform parameter")
            if self.num_trials < 2:
                raise ValueError("scheduler pb2 needs a population: num_trials of 2 or more")
        return self

    @property
    def perturbed(self) -> dict[str, Parameter]:
        """The parameters that PB2 changes while a trial runs."""
        reals = {k: p for k, p in self.parameters.items() if p.kind in ("uniform", "loguniform")}
        return reals if self.scheduler.name == "pb2" else {}

    @property
    def limit(self) -> float:
        """The budget in its unit."""
        return float(self.budget.epochs or self.budget.train_seconds or 0)

    @property
    def progress_measure(self) -> Literal["epoch", "train_time_s"]:
        """Column of results in the unit of the budget, at which schedulers compare trials."""
        return "epoch" if self.budget.epochs is not None else "train_time_s"

    @property
    def round_length(self) -> float:
        """PB2: between two exploits, in units of the budget."""
        return self.scheduler.interval or self.limit / 4

    @property
    def num_points(self) -> int:
        """Points that the search tries."""
        return len(self.grid_points()) if self.searcher.name == "grid" else self.num_trials

    def grid_points(self) -> list[dict[str, Any]]:
        """All combinations of a grid search, the last parameter changing fastest."""
        values = [parameter.values or () for parameter in self.parameters.values()]
        return [dict(zip(self.parameters, row, strict=True)) for row in itertools.product(*values)]

    def config(self, point: Point, seed: int) -> Config:
        """The configuration of a trial.

        Raises:
            ConfigError: If the values do not go together.
        """
        target = self.objective.target
        overrides = [
            *point.items(),
            ("train.seed", seed),
            ("train.target_accuracy", self.objective.target_accuracy),
            ("train.target", target and target.model_dump()),
            ("train.stop_at_target", True),
        ]
        if self.budget.epochs is not None:
            overrides.append(("train.epochs", self.budget.epochs))
        return parse_config(apply_overrides(self.base.to_change(), overrides))

    def shipped_config(self, point: Point) -> Config:
        """The content of `best_config.yaml`: the point, trained to the end of the budget."""
        config = self.config(point, self.base.train.seed)
        values = apply_overrides(
            config.model_dump(mode="json"),
            [("train.stop_at_target", self.base.train.stop_at_target)],
        )
        return parse_config(values)

    def default_point(self) -> dict[str, Any]:
        """The base configuration's own values of the parameters."""
        return {key: value_at(self.base, key) for key in self.parameters}


def value_at(config: Config, key: str) -> Any:
    """The value of `section.key` (or of an entry of a mapping below it)."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else getattr(node, part)
    return node


def read_space(path: str | Path, overrides: Sequence[str] = ()) -> SearchSpace:
    """Reads a YAML file; `overrides` are `section.key=value` for the base of every trial.

    Raises:
        ConfigError: With the field that is missing, misspelt or impossible.
    """
    file = user_path(path)
    values = read_yaml(file, "search space", "tune_spaces/smoke.yaml")
    base = values.get("base")
    if isinstance(base, str):
        known = find_config(base)
        beside = file.parent / base
        found = read_config(known if known and not beside.exists() else beside)
        values["base"] = found.model_dump(mode="json")
    elif not isinstance(base, dict):
        raise ConfigError(
            "a search space needs base", given=base, allowed="the path of a configuration file"
        )
    changes = values.pop("set", {})
    if not isinstance(changes, dict):
        raise ConfigError("bad value for set", given=changes, allowed="section.key: value")
    changed = [*changes.items(), *(split_override(text) for text in overrides)]
    for key, _ in changed:
        _refuse_owned(str(key), "set")
    values["base"] = apply_overrides(values["base"], changed)
    return parse_space(values)


def parse_space(values: Mapping[str, Any]) -> SearchSpace:
    """Validates a mapping whose `base` is a configuration.

    Raises:
        ConfigError: With the field that is missing, misspelt or impossible.
    """
    base = parse_config(values.get("base") or {})
    space = validate(SearchSpace, {**values, "base": base}, "the search space")
    for key, parameter in space.parameters.items():
        _refuse_owned(key, "parameters")
        for value in parameter.probes():
            _check_value(key, value, parameter)
    space.config({}, base.train.seed)
    for name, point in space.references.items():
        for key, value in point.items():
            _refuse_owned(key, f"references.{name}")
            _check_value(key, value, None)
        space.config(point, space.base.train.seed)
    return space


def _refuse_owned(key: str, where: str) -> None:
    if key in OWNED:
        raise ConfigError(
            f"{where} holds {key}, which the search sets itself", change=f"use {OWNED[key]}"
        )


def _check_value(key: str, value: Any, parameter: Parameter | None) -> None:
    """Refuses an unknown key and a value outside the key's own bounds."""
    if "." not in key:
        raise ConfigError(
            f"the search space names {key}, which is no configuration key", allowed="section.key"
        )
    try:
        Config.model_validate(apply_overrides({}, [(key, value)]))
    except ConfigError:
        # Rules between keys are checked for every trial.
        return
    except ValidationError as error:
        problems = [problem for problem in error.errors() if len(problem["loc"]) > 1]
        if any(problem["type"] == "extra_forbidden" for problem in error.errors()):
            parse_config(apply_overrides({}, [(key, value)]))
        if problems:
            allowed = dict.fromkeys(
                str(p["msg"]).removeprefix("Input should be ") for p in problems
            )
            source = "" if parameter is None else f" (from {parameter.kind})"
            is_fraction = isinstance(value, float) and not value.is_integer()
            raise ConfigError(
                f"the search space gives {key} a value that it cannot have",
                given=f"{value!r}{source}",
                allowed=" or ".join(allowed),
                change="use choice or randint for whole numbers" if is_fraction else None,
            ) from None


def log_scaled(parameter: Parameter, value: float) -> float:
    """A perturbed parameter's value on the scale that PB2 searches: logarithms of loguniform."""
    return math.log10(value) if parameter.kind == "loguniform" else value


def from_log_scale(parameter: Parameter, value: float) -> float:
    """The inverse of `log_scaled`, kept inside the bounds against rounding."""
    assert parameter.interval is not None
    low, high = parameter.interval
    plain = 10.0**value if parameter.kind == "loguniform" else value
    return min(max(plain, low), high)
