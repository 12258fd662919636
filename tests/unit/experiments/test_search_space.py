"""Search spaces: what is refused at once, and by which name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.errors import ConfigError
from elastic_kfac.experiments.search_space import (
    Parameter,
    SearchSpace,
    from_log_scale,
    log_scaled,
    parse_space,
    read_space,
)

SPACES = Path(__file__).parents[3] / "tune_spaces"


def space(**changes: Any) -> SearchSpace:
    values: dict[str, Any] = {
        "parameters": {"kfac.damping": {"loguniform": [1e-4, 1e-1]}},
        "objective": {"target_accuracy": 0.9},
        "budget": {"epochs": 2},
    }
    return parse_space({**values, **changes})


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_space_is_valid_and_its_default_runs(path: Path) -> None:
    found = read_space(path)
    config = found.config(found.default_point(), seed=7)
    assert config.train.seed == 7
    assert config.train.stop_at_target
    assert config.train.target_accuracy == found.objective.target_accuracy
    assert config.train.epochs == found.budget.epochs


def test_shipped_spaces_are_the_four_that_people_are_told_about() -> None:
    names = {path.stem for path in SPACES.glob("*.yaml")}
    assert names == {"kfac", "placement", "large_batch", "smoke"}


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"kfac.dampng": {"uniform": [0, 1]}}, "did you mean damping?"),
        ({"damping": {"uniform": [0, 1]}}, "no configuration key"),
        (
            {"kfac.damping.low": {"choice": [1]}},
            "gives kfac.damping.low a value that it cannot have",
        ),
        ({"kfac.damping": {"uniform": [-1, 1]}}, "kfac.damping a value that it cannot have"),
        ({"kfac.damping": {"loguniform": [0, 1]}}, "loguniform needs bounds above 0"),
        ({"kfac.damping": {"uniform": [1, 1]}}, "is empty"),
        ({"kfac.damping": {"unifrm": [0, 1]}}, "did you mean uniform"),
        ({"kfac.damping": {"uniform": [0.1, 1], "choice": [1]}}, "exactly one of"),
        ({"kfac.inverse_update_steps": {"uniform": [1, 10]}}, "use choice or randint"),
        ({"kfac.inverse_update_steps": {"choice": [10, 0]}}, "given: 0 (from choice)"),
        ({"kfac.method": {"choice": ["eigen", "cholesky"]}}, "kfac.method"),
        ({"kfac.enabled": {"uniform": [0, 1]}}, "kfac.enabled"),
        ({"train.seed": {"choice": [1]}}, "use repeats"),
        ({"train.epochs": {"choice": [1]}}, "use budget.epochs"),
        ({"kfac.damping": {"grid": [0.1]}}, "needs searcher"),
        ({"kfac.damping": {"choice": [0.1, 1, 0.1]}}, "choice has 0.1 twice"),
        ({"kfac.damping": {"grid": [1, 1.0]}}, "grid has 1.0 twice"),
        ({"kfac.damping": [0.1, 1]}, "a kind with its values, such as {choice: [0.1, 0.2]}"),
        ({"kfac.damping": {"uniform": [math.nan, 1]}}, "allowed: a finite number"),
        ({}, "parameters"),
    ],
)
def test_impossible_parameter_is_refused_with_its_name(
    parameters: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        space(parameters=parameters)
    assert named in refused.value.line()
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"budget": {}}, "exactly one of epochs and train_seconds"),
        ({"budget": {"epochs": 1, "train_seconds": 1}}, "exactly one of"),
        ({"objective": {"target_accuracy": 1.5}}, "objective.target_accuracy"),
        ({"objective": {"target_acuracy": 0.5}}, "did you mean target_accuracy"),
        ({"schduler": {}}, "did you mean scheduler"),
        ({"scheduler": {"name": "pb2"}, "repeats": 2}, "repeats 1"),
        ({"scheduler": {"name": "pb2"}, "num_trials": 1}, "population"),
        ({"searcher": {"name": "grid"}}, "needs grid or choice"),
        ({"references": {"x": {"train.seed": 3}}}, "use repeats"),
        ({"references": {"x": {"kfac.lr": 3}}}, "kfac.lr"),
        *(
            ({"references": {name: {}}}, "as names of references, other than best, confirm-")
            for name in ("a/b", "..", "", "best", "confirm-x", "t000", "ü", "a\n")
        ),
        ({"num_trials": 10**9}, "less than or equal to 10000"),
        ({"objective": {"target_accuracy": math.nan}}, "given: nan; allowed: "),
    ],
)
def test_impossible_space_is_refused_with_the_field(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        space(**changes)
    assert named in refused.value.line()


def test_file_with_overrides_changes_the_base_of_every_trial(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train: {global_batch_size: 64}\n")
    file = tmp_path / "space.yaml"
    file.write_text(
        "base: run.yaml\n"
        "set: {optimizer.lr: 0.5}\n"
        "parameters: {kfac.damping: {choice: [0.1]}}\n"
        "objective: {target_accuracy: 0.5}\n"
        "budget: {train_seconds: 3}\n"
    )
    found = read_space(file, ["optimizer.momentum=0.5"])
    config = found.config({"kfac.damping": 0.1}, seed=1)
    assert config.train.global_batch_size == 64
    assert (config.optimizer.lr, config.optimizer.momentum) == (0.5, 0.5)
    with pytest.raises(ConfigError, match="which the search sets itself"):
        read_space(file, ["train.epochs=3"])
    with pytest.raises(ConfigError, match="no such search space"):
        read_space(tmp_path / "other.yaml")


def test_grid_that_no_memory_holds_is_refused() -> None:
    many = {"grid": [*range(1, 60)]}
    keys = ("kfac.factor_update_steps", "kfac.inverse_update_steps", "train.global_batch_size")
    with pytest.raises(ConfigError, match="up to 10,000 points, the grid has 205,379"):
        space(parameters=dict.fromkeys(keys, many), searcher={"name": "grid"})


def test_grid_has_every_combination_in_order() -> None:
    found = space(
        parameters={
            "kfac.damping": {"grid": [0.1, 0.2]},
            "kfac.method": {"choice": ["eigen", "inverse"]},
        },
        searcher={"name": "grid"},
    )
    assert [tuple(point.values()) for point in found.grid_points()] == [
        (0.1, "eigen"),
        (0.1, "inverse"),
        (0.2, "eigen"),
        (0.2, "inverse"),
    ]
    assert found.num_points == 4


def test_shipped_config_is_the_point_without_what_only_the_search_wants() -> None:
    found = space()
    shipped = found.shipped_config({"kfac.damping": 0.05})
    assert shipped.kfac.damping == 0.05
    assert not shipped.train.stop_at_target
    assert shipped.train.seed == found.base.train.seed


def test_log_scale_returns_to_the_value_and_stays_in_bounds() -> None:
    log = Parameter(loguniform=(1e-3, 1e-1))
    assert log_scaled(log, 1e-2) == pytest.approx(-2)
    assert from_log_scale(log, log_scaled(log, 0.02)) == pytest.approx(0.02)
    assert from_log_scale(log, -0.5) == 1e-1
    assert from_log_scale(Parameter(uniform=(0.1, 0.9)), 0.3) == 0.3


def test_objective_is_a_metric_and_its_value_or_the_short_form() -> None:
    long = space(objective={"target": {"metric": "perplexity", "value": 4.0}})
    assert long.objective.quality.direction == "min"
    assert "perplexity 4" in long.objective.censoring_rule
    short = space(objective={"target_accuracy": 0.9})
    assert short.objective.goal.metric == "accuracy" and short.objective.goal.value == 0.9
    config = short.config({}, 0)
    assert config.train.goal == short.objective.goal
    for both in ({}, {"target_accuracy": 0.9, "target": {"metric": "f1", "value": 0.5}}):
        with pytest.raises(ConfigError, match="one of target and target_accuracy"):
            space(objective=both)
