"""The books of a search without a cluster: how trials end, what is best, and what is read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from ray.tune.search import Searcher

from elastic_kfac.cluster.tuning_books import SearchBooks
from elastic_kfac.cluster.tuning_journal import Journal, TrialRow
from elastic_kfac.cluster.tuning_search import Suggestions
from elastic_kfac.cluster.tuning_trial import write_books
from elastic_kfac.errors import UsageError
from elastic_kfac.training.config_file import read_config
from elastic_kfac.training.run_folder import RunFolder
from elastic_kfac.training.search_space import SearchSpace, parse_space


class _Method:
    def remote(self, *arguments: Any) -> None:
        return None


class _Desk:
    leave = set_waiting = _Method()


def make_space(**changes: Any) -> SearchSpace:
    return parse_space(
        {
            "parameters": {
                "kfac.damping": {"choice": [0.1, 0.2, 0.3]},
                "kfac.kl_clip": {"choice": [None, 1e-3]},
                "kfac.grad_worker_frac": {"choice": ["auto", 0.5]},
            },
            "objective": {"target_accuracy": 0.9},
            "budget": {"epochs": 2},
            "repeats": 3,
            **changes,
        }
    )


class Story:
    """A journal, its books, and trials that end as they are told to."""

    def __init__(self, folder: Path, space: SearchSpace) -> None:
        self.folder = folder
        self.journal = Journal(folder, "story", space)
        self.said: list[str] = []
        self.books = SearchBooks(self.journal, self.said.append)
        self.books.desk = _Desk()

    def point(self, number: int, damping: float) -> None:
        values = {"kfac.damping": damping, "kfac.kl_clip": None, "kfac.grad_worker_frac": "auto"}
        for repeat in range(3):
            row = TrialRow(f"t{number}-{repeat}", "search", str(number), repeat, dict(values))
            self.journal.add(row)

    def end(self, trial: str, seconds: float | None, ended: str, accuracy: float = 0.5) -> None:
        self.books.started(trial)
        run = RunFolder(self.folder / "trials" / trial)
        run.write_result(
            {"train_time_to_accuracy_s": seconds, "best_accuracy": accuracy, "steps": 10}
        )
        write_books(self.folder / "trials" / trial, {"cpu_seconds": 3.5, "peak_memory_bytes": 7})
        result = {"best_accuracy": accuracy, "steps": 10, "ended": ended, "cause": ""}
        self.books.ended(trial, {**result, "cause": "torn" if ended == "failed" else ""})


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path / "story", make_space())


def test_best_is_the_median_repeat_of_the_best_point(story: Story) -> None:
    for number, damping in enumerate((0.1, 0.2, 0.3)):
        story.point(number, damping)
    # The fastest single run is in point 0, whose median is slow.
    for trial, seconds in (("t0-0", 1.0), ("t0-1", 9.0), ("t0-2", 9.5)):
        story.end(trial, seconds, "target", accuracy=0.95)
    for trial, seconds in (("t1-0", 4.0), ("t1-1", 5.0), ("t1-2", None)):
        story.end(trial, seconds, "target" if seconds else "budget")
    story.end("t2-0", 2.0, "target")
    best = story.journal.best()
    assert best is not None
    assert best.trial_id == "t1-1"
    experiment = json.loads((story.folder / "experiment.json").read_text())
    assert (experiment["best"], experiment["best_point"]) == ("t1-1", 1)
    config = read_config(story.folder / "best_config.yaml")
    assert (config.kfac.damping, config.kfac.kl_clip) == (0.2, None)


def test_each_way_to_end_has_its_status_and_cause(story: Story) -> None:
    story.point(0, 0.1)
    story.point(1, 0.2)
    story.end("t0-0", None, "failed")
    story.end("t0-1", None, "")
    story.end("t0-2", None, "budget", accuracy=0.89)
    story.books.ended("t1-0", {}, crash="ActorDiedError: out of memory")
    story.books.interrupted.set()
    story.end("t1-1", None, "")
    rows = {name: (row.status, row.reason) for name, row in story.journal.rows.items()}
    assert rows["t0-0"] == ("failed", "torn")
    assert rows["t0-1"][0] == "stopped"
    assert rows["t0-2"] == ("finished", "the budget is used up")
    assert rows["t1-0"] == ("failed", "ActorDiedError: out of memory")
    assert rows["t1-1"] == ("pending", "interrupted")
    assert rows["t1-2"] == ("pending", "")
    assert any("t0-2 finished: best accuracy 89.00% (target 0.9)" in line for line in story.said)


def test_clone_is_told_once_and_its_values_are_the_new_ones(story: Story) -> None:
    story.point(0, 0.1)
    for _ in range(2):
        story.books.heard("t0-0", {"parent": "t1-0", "values": {"kfac.damping": 0.25}})
    row = story.journal.rows["t0-0"]
    assert (row.parent, row.parameters["kfac.damping"]) == ("t1-0", 0.25)
    assert story.said == ["t0-0 continues the state of t1-0"]


def test_stopped_trial_that_had_arrived_counts_like_one_that_ended(story: Story) -> None:
    for number, damping in enumerate((0.1, 0.2)):
        story.point(number, damping)
        for repeat in range(3):
            story.end(
                f"t{number}-{repeat}", 3.0 if number == 0 else None, "target" if number == 0 else ""
            )
    for repeat in range(3):
        # Parked only after the scheduler's word.
        run = RunFolder(story.folder / "trials" / f"t1-{repeat}")
        run.write_result({"train_time_to_accuracy_s": 2.0, "best_accuracy": 0.95, "steps": 10})
    assert {row.status for row in story.journal.repeats("search", "1")} == {"stopped"}
    story.books.settle()
    assert {row.status for row in story.journal.repeats("search", "1")} == {"finished"}
    best = story.journal.best()
    assert best is not None
    assert best.point == "1"


def test_books_are_read_again_as_they_were_written(story: Story) -> None:
    story.point(0, 0.1)
    story.end("t0-0", 2.5, "target", accuracy=0.91)
    story.end("t0-1", None, "failed")
    again = Journal(story.folder, "story", make_space())
    assert again.is_continued
    assert again.started == pytest.approx(story.journal.started)
    for name, row in story.journal.rows.items():
        kept = {key: value for key, value in row.numbers.items() if value is not None}
        assert again.rows[name].parameters == row.parameters
        assert again.rows[name].numbers == pytest.approx(kept)
        assert (again.rows[name].status, again.rows[name].reached) == (row.status, row.reached)
    with pytest.raises(UsageError, match="another space"):
        Journal(story.folder, "story", make_space(repeats=2))


def test_folder_of_a_run_is_not_taken_for_a_search(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}\n")
    with pytest.raises(UsageError, match="belongs to a run"):
        Journal(tmp_path / "run", "run", make_space())


def test_suggestions_run_every_seed_and_tell_optuna_the_score_once() -> None:
    space = make_space(searcher={"name": "optuna"}, num_trials=4)
    made: list[dict[str, Any]] = []
    ended: list[str] = []

    def on_point(point: Any) -> list[dict[str, Any]]:
        made.append(dict(point))
        if len(made) == 2:
            return []  # refused
        number = len(made) - 1
        return [
            {"trial": f"{number}-{seed}", "stage": "search", "point": point, "seed": seed}
            for seed in (0, 1)
        ]

    def score_of(assignment: Any) -> float | None:
        number = assignment["trial"][0]
        return 0.5 if sum(trial[0] == number for trial in ended) == 2 else None

    values = {"kfac.damping": 0.1, "kfac.kl_clip": None, "kfac.grad_worker_frac": 0.5}
    first = [
        {"trial": "sgd", "stage": "reference", "point": {}, "seed": 0},
        *({"trial": f"9-{s}", "stage": "search", "point": values, "seed": s} for s in (0, 1)),
    ]
    searcher = Suggestions(space, first, [(values, 0.25)], 4, on_point, score_of)
    # Ray Tune writes a copy to its folder before it begins.
    assert isinstance(cloudpickle.loads(cloudpickle.dumps(searcher)), Searcher)
    seen = []
    while isinstance(suggested := searcher.suggest(f"tune-{len(seen)}"), dict):
        seen.append(suggested["assignment"]["trial"])
        searcher.on_trial_complete(f"tune-{len(seen) - 1}", {})
        # Of a stopped trial the books hear after the searcher.
        ended.append(seen[-1])
    assert seen == ["sgd", "9-0", "9-1", "0-0", "0-1", "2-0", "2-1", "3-0", "3-1"]
    assert suggested == "FINISHED"
    trials = searcher._optuna._ot_study.trials
    # A point of an earlier call, one that an earlier call had not finished, and the new ones.
    known = [(trial.state.name, trial.value) for trial in trials]
    done = ("COMPLETE", 0.5)
    assert known == [("COMPLETE", 0.25), done, done, ("FAIL", None), done, done]
    assert trials[0].params == values
