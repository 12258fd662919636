"""A search's record without a cluster: how trials end, what is best, and what is read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.tune.search import Searcher

from elastic_kfac.config import parse_config, read_config
from elastic_kfac.data import make_shards
from elastic_kfac.errors import RunError, UsageError
from elastic_kfac.experiments.emulation import placed_step_seconds, trajectory
from elastic_kfac.experiments.search_folder import (
    SearchFolder,
    claimed_search,
    read_experiment,
)
from elastic_kfac.experiments.search_plan import SearchPlan
from elastic_kfac.experiments.search_record import SearchRecord
from elastic_kfac.experiments.search_space import SearchSpace, parse_space
from elastic_kfac.experiments.search_trial import write_extras
from elastic_kfac.experiments.searcher import TrialSearcher, make_scheduler
from elastic_kfac.experiments.trials import Trial
from elastic_kfac.state.run_folder import RunFolder


class _Method:
    def remote(self, *arguments: Any) -> None:
        return None


class _Broker:
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
    """A search's folder, its record, and trials that end as they are told to."""

    def __init__(self, folder: Path, space: SearchSpace) -> None:
        self.folder = folder
        self.search = SearchFolder(folder, "story", space)
        self.trials = self.search.trials
        self.said: list[str] = []
        self.plan = SearchPlan(self.search, 8, self.said.append)
        self.record = SearchRecord(self.search, self.plan, _Broker(), self.said.append)

    def point(self, number: int, damping: float) -> None:
        values = {"kfac.damping": damping, "kfac.kl_clip": None, "kfac.grad_worker_frac": "auto"}
        for repeat in range(3):
            self.add(f"t{number}-{repeat}", number, repeat, values)

    def add(self, name: str, number: int, seed: int, values: dict[str, Any]) -> None:
        self.trials.add(Trial(name, str(number), seed, "search", dict(values)))

    def end(self, trial: str, seconds: float | None, ended: str, accuracy: float = 0.5) -> None:
        self.record.on_start(trial)
        run = RunFolder(self.folder / "trials" / trial)
        run.write_result({"train_time_to_accuracy_s": seconds, "best_value": accuracy, "steps": 10})
        write_extras(self.folder / "trials" / trial, {"cpu_seconds": 3.5, "peak_memory_bytes": 7})
        result = {"best_value": accuracy, "steps": 10, "ended": ended, "cause": ""}
        self.record.on_end(trial, {**result, "cause": "torn" if ended == "failed" else ""})


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
    best = story.search.best()
    assert best is not None
    assert best.id == "t1-1"
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
    story.record.on_end("t1-0", {}, crash="ActorDiedError: out of memory")
    story.record.interrupted.set()
    story.end("t1-1", None, "")
    rows = {name: (row.status, row.reason) for name, row in story.trials.items()}
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
        story.record.on_result("t0-0", {"parent": "t1-0", "values": {"kfac.damping": 0.25}})
    row = story.trials["t0-0"]
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
        run.write_result({"train_time_to_accuracy_s": 2.0, "best_value": 0.95, "steps": 10})
    assert {row.status for row in story.trials.of("search", "1")} == {"stopped"}
    story.record.settle()
    assert {row.status for row in story.trials.of("search", "1")} == {"finished"}
    best = story.search.best()
    assert best is not None
    assert best.point == "1"


def test_folder_is_read_again_as_it_was_written(story: Story) -> None:
    story.point(0, 0.1)
    story.end("t0-0", 2.5, "target", accuracy=0.91)
    story.end("t0-1", None, "failed")
    again = SearchFolder(story.folder, "story", make_space())
    assert again.ended_before == 2
    assert again.started == pytest.approx(story.search.started)
    for name, row in story.trials.items():
        assert again.trials[name].parameters == row.parameters
        assert again.trials[name].numbers == pytest.approx(row.numbers)
        assert (again.trials[name].status, again.trials[name].reached) == (row.status, row.reached)
    with pytest.raises(UsageError, match="another space"):
        SearchFolder(story.folder, "story", make_space(repeats=2))


def test_folder_of_a_run_is_not_taken_for_a_search(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}\n")
    with pytest.raises(UsageError, match="belongs to a run"):
        SearchFolder(tmp_path / "run", "run", make_space())


def test_point_is_decided_when_its_seeds_have_ended_or_its_first_was_stopped(
    tmp_path: Path,
) -> None:
    story = Story(tmp_path / "story", make_space())
    values = {"kfac.damping": 0.1, "kfac.kl_clip": None, "kfac.grad_worker_frac": "auto"}
    story.add("t0-0", 0, 0, values)
    story.end("t0-0", 1.0, "target")
    # Its other seeds are still to come: as fast as it is, it is not the best yet.
    assert not story.search.seeds_of(story.trials["t0-0"]).is_decided(3)
    assert story.search.best() is None
    story.add("t1-0", 1, 0, values)
    story.end("t1-0", None, "", accuracy=0.8)
    [stopped] = story.trials.of("search", "1")
    assert stopped.status == "stopped"
    assert story.search.seeds_of(stopped).is_decided(3)
    assert story.search.score_of(stopped) == pytest.approx(1 + 0.1 / 0.9)
    for seed, seconds in ((1, 5.0), (2, 4.0)):
        story.add(f"t0-{seed}", 0, seed, values)
        story.end(f"t0-{seed}", seconds, "target")
    best = story.search.best()
    assert best is not None
    assert best.id == "t0-2"


class Plan:
    """A source of points with two seeds each; trials end when they are told to."""

    def __init__(self, stopped: tuple[str, ...] = (), refused: tuple[str, ...] = ()) -> None:
        self.stopped, self.refused = stopped, refused
        self.unwanted: tuple[str, ...] = ()
        self.running: list[str] = []
        self.ended: list[str] = []
        self.asked = 0
        self.points: dict[str, Any] = {}

    def trial(self, number: str, seed: int) -> dict[str, Any]:
        point = self.points[number]
        return {"trial": f"{number}-{seed}", "stage": "search", "point": point, "seed": seed}

    def new_point(self, point: Any) -> list[dict[str, Any]]:
        number, self.asked = str(self.asked), self.asked + 1
        self.points[number] = dict(point)
        return [] if number in self.refused else [self.trial(number, 0)]

    def score_of(self, assignment: Any) -> float | None:
        number = assignment["trial"][0]
        if number in self.stopped:
            return 1.5 if f"{number}-0" in self.ended else None
        return 0.5 if {f"{number}-0", f"{number}-1"} <= set(self.ended) else None

    def is_wanted(self, assignment: Any) -> bool:
        return assignment["trial"] not in self.unwanted

    def repeats_due(self) -> list[dict[str, Any]] | None:
        seen = [*self.running, *self.ended]
        due = [
            self.trial(number, 1)
            for number in self.points
            if number not in self.stopped
            and f"{number}-0" in self.ended
            and f"{number}-1" not in seen
        ]
        return due if due or any(trial.endswith("-0") for trial in self.running) else None

    def suggest(self, searcher: TrialSearcher) -> Any:
        suggested = searcher.suggest("tune")
        if isinstance(suggested, dict):
            trial = suggested["assignment"]["trial"]
            self.running.append(trial)
            return trial
        return suggested

    def end(self, searcher: TrialSearcher, trial: str) -> None:
        # A stopped trial is recorded after the searcher was told.
        searcher.on_trial_complete("tune", {})
        self.running.remove(trial)
        self.ended.append(trial)


def test_searcher_run_every_seed_and_tell_optuna_the_score_once() -> None:
    space = make_space(searcher={"name": "optuna"}, num_trials=4)
    plan = Plan(stopped=("2",), refused=("1",))
    values = {"kfac.damping": 0.1, "kfac.kl_clip": None, "kfac.grad_worker_frac": 0.5}
    plan.points["9"] = values
    first = [
        {"trial": "sgd", "stage": "reference", "point": {}, "seed": 0},
        plan.trial("9", 0),
    ]
    searcher = TrialSearcher(space, plan, first, [(values, 0.25)], 4)
    # Ray Tune writes a copy to its folder before it begins.
    assert isinstance(cloudpickle.loads(cloudpickle.dumps(searcher)), Searcher)
    seen = []
    while (suggested := plan.suggest(searcher)) not in (None, "FINISHED"):
        seen.append(suggested)
        plan.end(searcher, suggested)
    assert seen == ["sgd", "9-0", "9-1", "0-0", "0-1", "2-0", "3-0", "3-1"]
    assert suggested == "FINISHED"
    assert searcher._optuna is not None
    trials = searcher._optuna._ot_study.trials
    # A point of an earlier call, one that an earlier call had not finished, and the new ones.
    known = [(trial.state.name, trial.value) for trial in trials]
    done = ("COMPLETE", 0.5)
    assert known == [
        ("COMPLETE", 0.25),
        done,
        done,
        ("FAIL", None),
        ("COMPLETE", 1.5),
        done,
    ]
    assert trials[0].params == values


def test_searcher_passes_over_what_is_no_longer_wanted() -> None:
    plan = Plan()
    plan.points = {"0": {"kfac.damping": 0.1}, "1": {"kfac.damping": 0.2}}
    searcher = TrialSearcher(make_space(), plan, [plan.trial("0", 0), plan.trial("1", 0)])
    plan.unwanted = ("1-0",)
    assert [plan.suggest(searcher) for _ in range(2)] == ["0-0", None]
    plan.end(searcher, "0-0")
    assert [plan.suggest(searcher) for _ in range(2)] == ["0-1", "FINISHED"]


def test_searcher_wait_for_a_first_seed_and_end_at_once_when_closed() -> None:
    plan = Plan()
    plan.points = {"0": {"kfac.damping": 0.1}, "1": {"kfac.damping": 0.2}}
    first = [plan.trial("0", 0), plan.trial("1", 0)]
    searcher = TrialSearcher(make_space(), plan, first)
    assert [plan.suggest(searcher) for _ in range(3)] == ["0-0", "1-0", None]
    plan.end(searcher, "0-0")
    # Point 1 may still bring a seed.
    assert [plan.suggest(searcher) for _ in range(2)] == ["0-1", None]
    plan.end(searcher, "1-0")
    assert [plan.suggest(searcher) for _ in range(2)] == ["1-1", "FINISHED"]
    closed = TrialSearcher(make_space(), plan, first)
    closed.close()
    assert closed.suggest("tune") == "FINISHED"


def test_screening_stops_first_seeds_only_and_counts_nothing_else() -> None:
    space = make_space(scheduler={"name": "asha", "grace": 1}, budget={"epochs": 9})
    scheduler: Any = make_scheduler(space, 2)

    def trial(name: str, *, screened: bool) -> Any:
        made = SimpleNamespace(trial_id=name, config={"assignment": {"screened": screened}})
        scheduler.on_trial_add(None, made)
        return made

    def result(epoch: float, accuracy: float) -> dict[str, float]:
        return {"epoch": epoch, "best_value": accuracy}

    reference, repeat = trial("reference", screened=False), trial("repeat", screened=False)
    first, second = trial("first", screened=True), trial("second", screened=True)
    for unscreened in (reference, repeat):
        assert scheduler.on_trial_result(None, unscreened, result(1, 0.99)) == "CONTINUE"
        scheduler.on_trial_complete(None, unscreened, result(2, 0.99))
    # With 0.99 in its rung this one would have to go.
    assert scheduler.on_trial_result(None, first, result(1, 0.7)) == "CONTINUE"
    assert scheduler.on_trial_result(None, second, result(1, 0.6)) == "STOP"
    late = trial("late", screened=False)
    assert scheduler.on_trial_result(None, late, result(1, 0.1)) == "CONTINUE"


def test_more_trials_under_the_same_name_continue(tmp_path: Path) -> None:
    make_shards("digits", tmp_path / "digits")
    base = {"data": {"shards": str(tmp_path / "digits")}}

    def plan_of(num_trials: int) -> tuple[SearchFolder, SearchPlan]:
        space = make_space(
            base=base,
            parameters={"kfac.damping": {"loguniform": [1e-3, 1e-1]}},
            num_trials=num_trials,
            repeats=1,
        )
        search = SearchFolder(tmp_path / "story", "story", space)
        plan = SearchPlan(search, 8, print)
        plan.begin()
        return search, plan

    first, _ = plan_of(2)
    for trial in first.trials.values():
        trial.status = "finished"
    first.write()
    known = {name: dict(trial.parameters) for name, trial in first.trials.items()}
    more, _ = plan_of(5)
    assert [t.id for t in more.trials.values() if not t.ended] == ["t002", "t003", "t004"]
    assert {name: more.trials[name].parameters for name in known} == known
    assert plan_of(2)[1].points_left() == 0


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "digits"
    make_shards("digits", folder)
    return str(folder)


def _placement_search(folder: Path, digits: str, metric: str, **changes: Any) -> Story:
    space = make_space(
        base={"data": {"shards": digits}, "elastic": {"max_workers": 4}},
        parameters={
            "kfac.damping": {"grid": [0.01, 0.1]},
            "kfac.grad_worker_frac": {"grid": [0.25, 1.0]},
        },
        objective={"target_accuracy": 0.9, "metric": metric},
        searcher={"name": "grid"},
        references={},
        repeats=1,
        **changes,
    )
    return Story(folder, space)


def _begun(story: Story) -> dict[str, str]:
    story.plan.begin()
    return {name: trial.status for name, trial in story.trials.items()}


def test_points_that_differ_in_placement_share_the_training_of_the_fastest(
    tmp_path: Path, digits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {0.25: 0.002, 1.0: 0.003}
    monkeypatch.setattr(
        "elastic_kfac.experiments.search_plan.placed_step_seconds",
        lambda config, ranks: seconds[config.kfac.grad_worker_frac] * (ranks == 4),
    )
    story = _placement_search(tmp_path / "story", digits, "train_time_to_accuracy_s")
    assert list(_begun(story).values()) == ["pending", "shared", "pending", "shared"]
    reason = story.trials["t001"].reason
    assert reason == (
        "same training as t000: kfac.grad_worker_frac changes only seconds, by the model 3 ms a step "
        "against 2 ms"
    )
    assert f"t001 not trained: {reason}" in story.said
    story.end("t000", 4.0, "target", accuracy=0.95)
    shared = story.trials["t001"]
    # A time that was not measured is not made up.
    assert (shared.status, shared.value, shared.numbers["steps"]) == ("shared", None, 10.0)
    assert story.search.best() is story.trials["t000"]
    again = _placement_search(tmp_path / "story", digits, "train_time_to_accuracy_s")
    assert again.plan.points_left() == 0
    seconds[0.25] = 0.004
    other = _placement_search(tmp_path / "other", digits, "train_time_to_accuracy_s")
    assert list(_begun(other).values()) == ["shared", "pending", "shared", "pending"]


def test_on_emulated_links_a_shared_training_decides_every_placement(
    tmp_path: Path, digits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "elastic_kfac.experiments.emulation.Emulator.step_seconds",
        lambda self, config: 0.5 * config.kfac.grad_worker_frac,
    )
    monkeypatch.setattr(
        "elastic_kfac.experiments.emulation.Emulator.memory_bytes",
        lambda self, config: 1e6 / config.kfac.grad_worker_frac,
    )
    story = _placement_search(tmp_path / "story", digits, "emulated_time_to_accuracy_s")
    _begun(story)
    story.end("t000", 4.0, "target", accuracy=0.95)
    story.end("t002", None, "budget", accuracy=0.5)
    objectives = {name: trial.value for name, trial in story.trials.items()}
    assert objectives == {"t000": 1.25, "t001": 5.0, "t002": None, "t003": None}
    assert {trial.status for trial in story.trials.values()} == {"finished"}
    assert [trial.reached for trial in story.trials.values()] == [True, True, False, False]
    # The front has the memory of every placement, trained or not.
    points = read_experiment(story.folder).points
    memory = {p.name: p.median("model_memory_bytes") for p in points if p.value is not None}
    assert memory == {"0": 4e6, "1": 1e6}


def test_real_models_of_placements_find_a_difference(digits: str) -> None:
    config = parse_config({"data": {"shards": digits}, "kfac": {"grad_worker_frac": 0.25}})
    other = config.model_copy(
        update={"kfac": config.kfac.model_copy(update={"grad_worker_frac": 1.0})}
    )
    assert trajectory(config) == trajectory(other)
    assert trajectory(config) != trajectory(
        config.model_copy(update={"kfac": config.kfac.model_copy(update={"damping": 0.5})})
    )
    assert placed_step_seconds(config, 1) == placed_step_seconds(other, 1) > 0
    assert placed_step_seconds(config, 4) != placed_step_seconds(other, 4)


def test_optuna_gets_more_points_and_never_fewer_than_none(story: Story) -> None:
    story.point(0, 0.1)
    story.record.write()
    for num_trials, left in ((1, 0), (4, 3)):
        space = make_space(searcher={"name": "optuna"}, num_trials=num_trials)
        story.search.space = space
        assert SearchPlan(story.search, 8, print).points_left() == left


DAMAGE: dict[str, Any] = {
    "experiment.json cut": ("experiment.json", lambda text: text[:50]),
    "experiment.json empty": ("experiment.json", lambda text: ""),
    "experiment.json a list": ("experiment.json", lambda text: "[1]"),
    "experiment.json gone": ("experiment.json", None),
    "trials.csv cut in a line": ("trials.csv", lambda text: text[:-30]),
    "trials.csv cut after a line": ("trials.csv", lambda text: text.rpartition("\n")[0][:-1]),
    "trials.csv without its last line": (
        "trials.csv",
        lambda text: text.rstrip("\n").rpartition("\n")[0] + "\n",
    ),
    "trials.csv empty": ("trials.csv", lambda text: ""),
    "trials.csv gone": ("trials.csv", None),
    "trials.csv with semicolons": ("trials.csv", lambda text: text.replace(",", ";")),
    "trials.csv of something else": ("trials.csv", lambda text: "a,b\n1,2\n"),
    "trials.csv with a point that is no number": (
        "trials.csv",
        lambda text: text.replace("t0-2,search,0", "t0-2,search,x"),
    ),
    "trials.csv with a line twice": (
        "trials.csv",
        lambda text: text + text.rstrip("\n").rpartition("\n")[2] + "\n",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_record_is_refused_in_one_line_and_left_as_it_is(story: Story, name: str) -> None:
    story.point(0, 0.1)
    story.end("t0-0", 1.0, "target")
    file, damage = DAMAGE[name]
    path = story.folder / file
    if damage is None:
        path.unlink()
    else:
        damaged = damage(path.read_text())
        assert damaged != path.read_text()
        path.write_text(damaged)
    files = [f for f in (story.folder / n for n in ("experiment.json", "trials.csv")) if f.exists()]
    before = [(f, f.read_bytes()) for f in files]
    with pytest.raises(UsageError, match="damaged") as caught:
        SearchFolder(story.folder, "story", make_space())
    assert "\n" not in caught.value.line() and file in caught.value.line()
    assert [(f, f.read_bytes()) for f in files] == before


def test_search_of_an_earlier_version_lacks_new_keys_and_continues(story: Story) -> None:
    story.point(0, 0.1)
    story.record.write()
    path = story.folder / "experiment.json"
    stored = json.loads(path.read_text())
    del stored["space"]["base"]["kfac"]["stagger"], stored["space"]["keep_states"]
    path.write_text(json.dumps(stored))
    assert len(SearchFolder(story.folder, "story", make_space()).trials) == 3
    stored["space"]["base"]["kfac"]["damping"] = 0.7
    path.write_text(json.dumps(stored))
    with pytest.raises(UsageError, match=r"another space: base\.kfac\.damping differ"):
        SearchFolder(story.folder, "story", make_space())


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda text: text.replace("finished", "done"), "trial t0-0 has the unknown status 'done'"),
        (lambda text: "".join(text.splitlines(True)[:1] + text.splitlines(True)[2:]), "2 of 3"),
    ],
)
def test_report_refuses_a_table_whose_answer_would_be_wrong(
    story: Story, damage: Callable[[str], str], line: str
) -> None:
    story.point(0, 0.1)
    story.end("t0-0", 1.0, "target")
    story.record.write()
    path = story.folder / "trials.csv"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UsageError, match=f"a damaged folder of a search: {line}"):
        read_experiment(story.folder)


def test_record_with_the_mark_of_a_spreadsheet_is_read(story: Story) -> None:
    story.point(0, 0.1)
    story.end("t0-0", 1.0, "target")
    path = story.folder / "trials.csv"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    again = SearchFolder(story.folder, "story", make_space())
    assert {t.id: t.status for t in again.trials.values()} == {
        "t0-0": "finished",
        "t0-1": "pending",
        "t0-2": "pending",
    }


@pytest.mark.parametrize("keep", [False, True])
def test_states_of_trials_that_lost_go_unless_they_are_kept(tmp_path: Path, keep: bool) -> None:
    story = Story(tmp_path / "story", make_space(keep_states=keep))

    def state(trial: str) -> Path:
        return story.folder / "trials" / trial / "checkpoints" / "step-1"

    story.point(0, 0.1)
    story.point(1, 0.2)
    story.add("t2-0", 2, 0, {**story.trials["t0-0"].parameters, "kfac.damping": 0.3})
    for trial in story.trials:
        state(trial).mkdir(parents=True)
    for trial in ("t0-0", "t0-1", "t0-2"):
        story.end(trial, 5.0, "target")
    # Undecided, so it may still win.
    story.end("t1-0", 1.0, "target")
    assert all(state(trial).exists() for trial in story.trials)
    story.end("t1-1", 1.0, "target")
    story.end("t1-2", 1.0, "target")
    story.end("t2-0", None, "")
    assert [t for t in story.trials if not state(t).exists()] == (
        [] if keep else ["t0-0", "t0-1", "t0-2"]
    )
    story.record.close()
    gone = [t for t in story.trials if not state(t).exists()]
    assert gone == ([] if keep else ["t0-0", "t0-1", "t0-2", "t2-0"])
    assert (story.folder / "trials" / "t0-0" / "result.json").exists()


def test_search_has_one_writer(tmp_path: Path) -> None:
    with claimed_search(tmp_path / "s", "s", make_space(), print) as search:
        search.write()
        with (
            pytest.raises(UsageError, match="search s is in use by another process"),
            claimed_search(tmp_path / "s", "s", make_space(), print),
        ):
            pytest.fail("two writers")
    with claimed_search(tmp_path / "s", "s", make_space(), print):
        pass


def test_full_disk_is_told_once_and_the_next_write_holds_everything(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    story.point(0, 0.1)
    write, full = SearchFolder.write, [True]

    def write_if_there_is_room(search: SearchFolder) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        write(search)

    monkeypatch.setattr(SearchFolder, "write", write_if_there_is_room)
    story.end("t0-0", 1.0, "target")
    story.end("t0-1", 1.0, "target")
    assert ["No space left" in line for line in story.said].count(True) == 1
    with pytest.raises(RunError, match=r"lacks its last changes.*No space left"):
        story.record.close()
    full[0] = False
    story.record.close()
    assert (story.folder / "trials.csv").read_text().count(",finished,") == 2
