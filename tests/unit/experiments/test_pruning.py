"""Trials that a finished one has beaten: what is pruned never changes a winner or a front."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_kfac.data import make_shards
from elastic_kfac.experiments.pruning import Costs, beaten_by
from elastic_kfac.experiments.search_folder import SearchFolder, read_experiment
from elastic_kfac.experiments.search_plan import SearchPlan
from elastic_kfac.experiments.search_record import SearchRecord, StopWhen
from elastic_kfac.experiments.search_space import parse_space
from elastic_kfac.experiments.search_trial import StopRequest, _Watch, write_extras
from elastic_kfac.experiments.trials import Trial
from elastic_kfac.reports.search_page import render_search
from elastic_kfac.state.run_folder import RunFolder

AXES = ("objective", "memory_bytes", "worker_seconds")


def front(trials: dict[str, Costs]) -> set[tuple[Any, ...]]:
    """Costs that no other trial is better than in one and no worse than in all, by trying all pairs."""
    costs = {tuple(getattr(c, axis) for axis in AXES) for c in trials.values()}

    def beats(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return {b for b in costs if not any(beats(a, b) for a in costs)}


@pytest.mark.parametrize("seed", range(40))
def test_pruned_searches_end_with_the_front_of_exhaustive_ones(seed: int) -> None:
    """Trials reach the target after some evaluations, or never; costs grow from one to the next."""
    rng = random.Random(seed)
    whole: dict[str, Costs] = {}
    pruned: dict[str, Costs] = {}
    saved = 0
    for number in range(12):
        needed, step_s = rng.randint(1, 12), rng.choice([0.5, 1.0, 3.0])
        memory, workers = rng.choice([1.0, 2.0, 4.0]), rng.choice([1, 2])
        misses = rng.random() < 0.2
        for evaluation in range(1, 13):
            seconds = evaluation * step_s
            costs = Costs(seconds, memory, seconds * workers)
            if evaluation == needed and not misses:
                whole[str(number)] = pruned[str(number)] = costs
                break
            if beaten_by(costs, pruned) is not None:
                saved += 1
                if not misses:
                    seconds = needed * step_s
                    whole[str(number)] = Costs(seconds, memory, seconds * workers)
                break
    assert front(pruned) == front(whole)
    assert saved, "nothing was pruned: nothing was tested"


def test_costs_that_are_not_known_are_not_weighed_and_noise_is_forgiven() -> None:
    finished = {"a": Costs(4.0, 100.0, 8.0), "b": Costs(3.0, 200.0, 6.0), "c": Costs(5.0)}
    assert beaten_by(Costs(3.0), finished) == "b"
    assert beaten_by(Costs(2.9), finished) is None
    assert beaten_by(Costs(9.0, 150.0), finished) == "a"
    assert beaten_by(Costs(9.0, 99.5), finished) is None
    assert beaten_by(Costs(9.0, 99.5), finished, noise=0.01) == "a"
    assert beaten_by(Costs(9.0, 300.0, 5.9), finished) is None
    assert beaten_by(Costs(9.0), {}) is None


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "digits"
    make_shards("digits", folder)
    return str(folder)


class _Method:
    def remote(self, *arguments: Any) -> None:
        return None


class Story:
    """A grid search of four points, and its trials as they are told to go."""

    def __init__(self, folder: Path, digits: str, metric: str, **changes: Any) -> None:
        space = {
            "base": {
                "data": {"shards": digits},
                "elastic": {"max_workers": 4},
                "train": {"global_batch_size": 64},
            },
            "parameters": {
                "kfac.damping": {"grid": [0.01, 0.1]},
                "kfac.grad_worker_frac": {"grid": [0.25, 1.0]},
            },
            "objective": {"target_accuracy": 0.9, "metric": metric},
            "budget": {"epochs": 20},
            "searcher": {"name": "grid"},
            "references": {},
            **changes,
        }
        self.said: list[str] = []
        self.search = SearchFolder(folder, "story", parse_space(space))
        self.trials = self.search.trials
        self.plan = SearchPlan(self.search, 8, self.said.append)
        broker = SimpleNamespace(leave=_Method(), set_waiting=_Method())
        self.record = SearchRecord(self.search, self.plan, broker, self.said.append)

    @property
    def states(self) -> list[str]:
        return [trial.status for trial in self.trials.values()]

    def result(self, trial: str, **values: Any) -> dict[str, Any]:
        return {"trial": trial, "best_value": 0.5, "ended": "", "cause": "", **values}

    def finish(self, trial: str, steps: int, seconds: float, **extras: Any) -> None:
        self.record.on_start(trial)
        folder = self.search.folder / "trials" / trial
        result = {
            "train_time_to_accuracy_s": seconds,
            "steps": steps,
            "worker_seconds": 2 * seconds,
        }
        RunFolder(folder).write_result({**result, "best_value": 0.95})
        write_extras(folder, {"peak_memory_bytes": 1000, **extras})
        self.record.on_end(trial, self.result(trial, steps=steps, ended="target"))

    def evaluate(self, trial: str, **values: Any) -> bool:
        """Whether Ray Tune is told to stop a trial that missed the target; its end follows then."""
        result = self.result(trial, **values)
        stops = StopWhen(self.record.interrupted, self.record.is_beaten)("ray's own id", result)
        self.record.on_result(trial, result)
        if stops:
            self.record.on_end(trial, result)
        return stops


def test_running_trial_is_stopped_once_it_has_spent_all_that_a_finished_one_needed(
    tmp_path: Path, digits: str
) -> None:
    story = Story(
        tmp_path,
        digits,
        "train_time_to_accuracy_s",
        parameters={"kfac.damping": {"grid": [1, 2, 3]}},
    )
    story.plan.begin()
    story.record.on_start("t001")
    spent = {"peak_memory_bytes": 1200, "least_worker_seconds": 8.0, "steps": 40}
    assert not story.evaluate("t001", **spent, train_time_s=99.0)  # nobody has finished
    story.finish("t000", 50, 4.0)
    assert not story.evaluate("t001", **spent, train_time_s=3.9)
    assert not story.evaluate("t001", **{**spent, "peak_memory_bytes": 900}, train_time_s=4.5)
    assert not story.evaluate("t001", **{**spent, "least_worker_seconds": 7.9}, train_time_s=4.5)
    assert not story.evaluate("t001", **spent, train_time_s=4.5, ended="budget")
    assert story.evaluate("t001", **spent, train_time_s=4.5)
    assert story.states == ["finished", "pruned", "pending"]
    assert story.trials["t001"].reason == (
        "cannot beat t000 (4 training seconds): 4.5 training seconds are spent without the target, and "
        "not less memory or worker time"
    )
    assert any(line.startswith("t001 pruned") and "cannot beat t000" in line for line in story.said)
    page = render_search(read_experiment(story.search.folder))
    assert "Pruned, because a finished trial had beaten them" in page
    assert "cannot beat t000 (4 training seconds)" in page


def test_trial_that_reached_the_target_before_it_stopped_counts(
    tmp_path: Path, digits: str
) -> None:
    story = Story(
        tmp_path, digits, "train_time_to_accuracy_s", parameters={"kfac.damping": {"grid": [1, 2]}}
    )
    story.plan.begin()
    story.finish("t000", 50, 4.0)
    story.record.on_start("t001")
    assert story.evaluate("t001", train_time_s=4.5)
    folder = RunFolder(story.search.folder / "trials" / "t001")
    folder.write_result({"train_time_to_accuracy_s": 4.6, "steps": 60, "best_value": 0.95})
    story.record.settle()
    assert (story.states, story.trials["t001"].value) == (["finished"] * 2, 4.6)


@pytest.mark.parametrize(
    "changes", [{"prune": False}, {"repeats": 3}, {"objective": {"target_accuracy": 0.9}}]
)
def test_only_what_is_certain_is_pruned(
    tmp_path: Path, digits: str, changes: dict[str, Any]
) -> None:
    """A median of seeds may be less than a seed; a reference is no point of the search."""
    story = Story(tmp_path, digits, "train_time_to_accuracy_s", **changes)
    stage = "reference" if "objective" in changes else "search"
    for name in ("first", "other"):
        values = {"kfac.damping": 0.1, "kfac.grad_worker_frac": 1.0}
        story.trials.add(Trial(name, "7" if name == "first" else "8", 0, stage, values))
    story.finish("first", 50, 4.0)
    story.record.on_start("other")
    assert not story.evaluate("other", train_time_s=99.0)


def _with_model(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[Any, float], memory: dict[Any, float]
) -> None:
    """Of a step and of a worker, by damping and fraction."""
    for name, values in (("step_seconds", seconds), ("memory_bytes", memory)):
        monkeypatch.setattr(
            f"elastic_kfac.experiments.emulation.Emulator.{name}",
            lambda self, config, values=values: values[
                config.kfac.damping, config.kfac.grad_worker_frac
            ],
        )


EMULATED = "emulated_time_to_accuracy_s"


def test_on_emulated_links_a_trial_need_not_begin(
    tmp_path: Path, digits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch of digits has 23 steps of 64 samples, and there is no evaluation before its end."""
    seconds = {(0.01, 0.25): 0.1, (0.01, 1.0): 0.2, (0.1, 0.25): 0.31, (0.1, 1.0): 0.35}
    memory = {(0.01, 0.25): 5.0, (0.01, 1.0): 7.0, (0.1, 0.25): 6.0, (0.1, 1.0): 8.0}
    _with_model(monkeypatch, seconds, memory)
    story = Story(tmp_path / "a", digits, EMULATED)
    story.plan.begin()
    assert story.states == ["pending", "shared", "pending", "shared"]
    story.finish("t000", 69, 1.0)
    # 6.9 s on these links; the others need 23 · 0.31 = 7.13 s to their first evaluation.
    assert story.states == ["finished", "finished", "pruned", "shared"]
    assert story.trials["t002"].reason == (
        "cannot beat t000 (6.9 seconds on emulated links): 23 steps to its first evaluation are 7.13 s "
        "by the model without the target, and not less memory or worker time"
    )
    points = read_experiment(story.search.folder).points
    assert [point.name for point in points if point.value is not None] == ["0", "1"]
    # With a placement that needs less memory the training is worth its time.
    memory[0.1, 1.0] = 4.0
    other = Story(tmp_path / "b", digits, EMULATED)
    other.plan.begin()
    other.finish("t000", 69, 1.0)
    assert other.states == ["finished", "finished", "pending", "shared"]


def test_on_emulated_links_steps_taken_count(
    tmp_path: Path, digits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {(0.01, 0.25): 0.1, (0.01, 1.0): 0.2, (0.1, 0.25): 0.2, (0.1, 1.0): 0.3}
    _with_model(monkeypatch, seconds, dict.fromkeys(seconds, 5.0))
    story = Story(tmp_path, digits, EMULATED)
    story.plan.begin()
    story.finish("t000", 69, 1.0)
    assert story.states[2] == "pending"
    story.record.on_start("t002")
    assert not story.evaluate("t002", steps=23)
    assert story.evaluate("t002", steps=46)
    assert "46 steps are 9.2 s by the model" in story.trials["t002"].reason


def test_workers_time_is_counted_from_below_through_resizes_and_lost_steps() -> None:
    broker = SimpleNamespace(stop_reason=_Method())
    space = SimpleNamespace(budget=SimpleNamespace(train_seconds=None))
    watch = _Watch(SimpleNamespace(space=space, broker=broker), StopRequest(), None, {})  # type: ignore[arg-type]
    for trained_s, workers in (
        (0.0, 2),
        (1.0, 2),
        (3.0, 2),
        (3.5, 1),
        (2.0, 1),
        (3.0, 1),
        (5.5, 3),
    ):
        watch._count_workers(trained_s, workers)
    assert watch.extras()["least_worker_seconds"] == pytest.approx(2.0 + 4.0 + 0.5 + 2.0)
