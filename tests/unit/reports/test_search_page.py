from __future__ import annotations

import itertools
import json
import re
import shutil
import statistics
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.cli import main
from elastic_kfac.cli.runs import locate_run
from elastic_kfac.errors import UsageError
from elastic_kfac.experiments.importance import (
    eta_squared,
    groups_of,
    importances,
    midranks,
)
from elastic_kfac.experiments.search_folder import read_experiment
from elastic_kfac.experiments.trials import Point
from elastic_kfac.reports.search_figures import curves_figure, pareto_front
from elastic_kfac.reports.search_page import SECTIONS, headline, progress_line, write_search_page
from elastic_kfac.runs.summary import duration
from support.search_folders import BEGAN, HOSTILE, PARAMETERS, TARGET, row, rows, write_search

VOID = {"meta", "link", "br", "input"}
ORDER = (
    "Result",
    "Failed, rejected, shared, pruned and stopped trials",
    "Configuration to use",
    "Time to accuracy",
    "Memory against time",
    "Parameters",
    "Parameter importance",
    "Timeline",
    "All trials",
    "Provenance",
)


class Page(HTMLParser):
    """The tables of a page by name, its headings, and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self.scripts = 0
        self._table = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        given = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in given.items()]
        self.scripts += tag == "script"
        if tag == "table":
            self._table = given.get("aria-label", f"#{len(self.tables)}")
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
        elif tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "h2" in self.open:
            self.headings[-1] += data
        if {"td", "th"} & set(self.open):
            self.tables[self._table][-1][-1] += data

    def fetched(self) -> list[tuple[str, str, str]]:
        """Attributes that name something outside the page."""
        names = ("src", "href", "xlink:href", "action", "srcset", "background", "data", "poster")
        return [
            found
            for found in self.attributes
            if found[1] in names and not found[2].startswith(("#", "data:"))
        ]


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return rows()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, found: list[dict[str, Any]]) -> Path:
    return write_search(tmp_path_factory.mktemp("search") / "tune-smoke-1", found)


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return write_search_page(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def repeats(found: list[dict[str, Any]], point: str) -> list[dict[str, Any]]:
    return [each for each in found if str(each["point"]) == point]


def median_of(found: list[dict[str, Any]], point: str) -> float | None:
    """The median repeat's objective by brute force: infinitely late where it was not reached."""
    late = float("inf")
    values = sorted(
        float(each["objective"]) if each["reached"] == "true" else late
        for each in repeats(found, point)
    )
    middle = values[len(values) // 2]
    return None if middle == late else middle


def test_page_has_every_section_in_the_order_that_readers_expect(page: Page) -> None:
    assert tuple(page.headings) == ORDER == tuple(SECTIONS.values())


def test_page_is_well_formed_and_can_load_nothing(page: Page, text: str) -> None:
    assert page.open == []
    assert page.fetched() == []
    assert page.scripts == 1
    assert not re.findall(r"url\((?!#)|@import", text)
    assert "default-src 'none'" in text
    images = [name for tag, name, _ in page.attributes if tag == "svg"]
    assert images.count("aria-label") == images.count("role") == text.count("<svg") == 7


def test_page_ids_and_figures_are_valid(page: Page, text: str) -> None:
    identities = [value for _, name, value in page.attributes if name == "id"]
    assert len(identities) == len(set(identities))
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_table_of_points_equals_brute_force_from_the_csv(
    page: Page, found: list[dict[str, Any]]
) -> None:
    head, *table = page.tables["All searched points"]
    names = sorted({str(r["point"]) for r in found if r["stage"] == "search"}, key=int)
    assert len(table) == len(names) == 14
    for cells in table:
        name = next(str(r["point"]) for r in found if r["trial_id"] == cells[0])
        value, trials = median_of(found, name), repeats(found, name)
        assert cells[2] == f"{sum(r['reached'] == 'true' for r in trials)} of 3"
        if value is not None:
            assert cells[1].startswith(duration(value) + " [")
            reached = [float(r["objective"]) for r in trials if r["reached"] == "true"]
            assert cells[1].endswith(f"[{min(reached):.3g}–{max(reached):.3g}]")
            steps = statistics.median(r["steps"] for r in trials)
            assert cells[head.index("steps")] == f"{steps:,.0f}"
    medians = [median_of(found, next(str(r["point"]) for r in found if r["trial_id"] == c[0]))
               for c in table]  # fmt: skip
    arrived = [value for value in medians if value is not None]
    assert arrived == sorted(arrived) == medians[: len(arrived)]
    assert len(arrived) == 12


def test_table_of_trials_has_every_row_and_its_numbers(
    page: Page, found: list[dict[str, Any]]
) -> None:
    head, *table = page.tables["All trials"]
    assert [cells[0] for cells in table] == [r["trial_id"] for r in found]
    for cells, each in zip(table, found, strict=True):
        state = "rejected" if each["status"] == "refused" else each["status"]
        assert cells[head.index("state")] == state
        for column, name in (("CPU seconds", "cpu_seconds"), ("worker-seconds", "worker_seconds")):
            expected = "–" if each[name] == "" else f"{each[name]:,.1f}"
            assert cells[head.index(column)] == expected
        resized = each["seed"] == 1 and each["started"] != ""
        assert cells[head.index("resizes")] == str(int(resized))


def test_headline_compares_the_winner_with_the_references(
    folder: Path, page: Page, found: list[dict[str, Any]]
) -> None:
    points = {str(r["point"]) for r in found if r["stage"] == "search"}
    best = min(value for p in points if (value := median_of(found, p)) is not None)
    default, sgd = (median_of(found, name) for name in ("default", "sgd"))
    assert default is not None and sgd is not None
    sentence = headline(read_experiment(folder))
    assert f"reaches 95.00% test accuracy in {duration(best)} of training" in sentence
    assert f"{default / best:.2f} times faster than the default configuration" in sentence
    assert f"{sgd / best:.2f} times faster than sgd" in sentence
    assert [cells[0] for cells in page.tables["Best and references"][1:]][1:] == ["default", "sgd"]


def test_failed_refused_and_stopped_trials_come_with_their_cause(page: Page) -> None:
    assert page.tables["Failed"][1][:2] == [
        "p005-s1",
        "NumericalError: the loss is not finite at step 12",
    ]
    refused = page.tables["Rejected before the start"][1]
    assert refused[:3] == [
        "p003-s0p003-s1p003-s2",
        "9.1 GiB needed, 4.0 GiB are there",
        "0, 1, 2",
    ]
    assert "kfac.damping=" in refused[3]
    assert page.tables["Stopped early"][1][2] == "0, 1, 2"


def test_page_carries_the_files_and_the_commands(
    page: Page, text: str, folder: Path, found: list[dict[str, Any]]
) -> None:
    from urllib.parse import unquote

    links = [v for tag, name, v in page.attributes if tag == "a" and name == "href"]
    saved = [unquote(link.partition(",")[2]) for link in links if link.startswith("data:")]
    assert (folder / "trials.csv").read_text() in saved
    assert (folder / "best_config.yaml").read_text() in saved
    assert f"elastic-kfac train {folder}/best_config.yaml" in text
    assert "2.15.0" in text and "a processor" in text
    assert page.tables["Best point and default"][1][2] == "0.001"


def test_page_written_twice_has_equal_bytes(folder: Path, text: str) -> None:
    assert write_search_page(folder).read_text(encoding="utf-8") == text
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    found = rows(seeds=1, points=4)
    for each in found:
        each["trial_id"] = f"{each['trial_id']}{HOSTILE}"
        each["reason"] = HOSTILE
        each[PARAMETERS[2]] = HOSTILE
        each["run_folder"] = "javascript:window.broken=1//../../../etc"
    folder = write_search(
        tmp_path / "search",
        found,
        runs=False,
        best_config=HOSTILE,
        name=HOSTILE,
        rule_for_censored=HOSTILE,
        versions={HOSTILE: HOSTILE},
        status=HOSTILE,
    )
    text = write_search_page(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.scripts == 1
    assert page.fetched() == []
    assert not [found for found in page.attributes if found[0] == "img"]
    assert not [found for found in page.attributes if found[1].startswith("on")]
    assert HOSTILE in page.tables["All trials"][1][0]


def test_running_search_says_how_far_it_is(tmp_path: Path) -> None:
    found = rows(seeds=1, points=5)[:4]
    found[-1] |= {"status": "running", "objective": "", "reached": "", "ended": ""}
    folder = write_search(tmp_path / "search", found, status="running", best_config=None)
    text = write_search_page(folder).read_text(encoding="utf-8")
    experiment = read_experiment(folder)
    # 14 points and 2 references are planned; 3 of the 4 that there are have ended.
    assert progress_line(experiment) == "· 3 of 16 trials done, 1 running"
    assert 'aria-valuenow="3"' in text and 'id="live"' in text
    assert headline(experiment).startswith("Still searching. ")
    assert "best_config.yaml has not been written yet" in text


def test_curve_of_a_reference_has_its_name_before_its_median_has_begun(tmp_path: Path) -> None:
    waiting = {"status": "pending", "started": "", "ended": "", "objective": "", "reached": ""}
    unknown = {"run_folder": "", "best_value": "", "steps": "", "train_time_s": ""}
    running, *others = rows(seeds=3, points=0)[:3]
    running |= {"status": "running", "objective": "", "reached": "", "ended": ""}
    found = [running, *(row | waiting | unknown for row in others)]
    folder = write_search(tmp_path / "search", found, status="running", best_config=None)
    experiment = read_experiment(folder)
    assert not experiment.references["default"].representative.evaluations
    assert curves_figure(experiment, "seconds").count(">default<") == 1


def test_search_without_a_single_trial_is_a_page(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", [], status="running", best_config=None)
    (folder / "trials.csv").unlink()
    page = Page(write_search_page(folder).read_text(encoding="utf-8"))
    assert page.open == [] and tuple(page.headings) == ORDER
    assert headline(read_experiment(folder)) == "Still searching. No trial has finished yet."


def test_objective_that_is_no_number_counts_as_missed(tmp_path: Path) -> None:
    found = rows(seeds=1, points=3)
    for each in found:
        each |= {"objective": "NaN", "steps": "inf", "best_value": ""}
    folder = write_search(tmp_path / "search", found, runs=False)
    page = Page(write_search_page(folder).read_text(encoding="utf-8"))
    assert page.open == []
    assert headline(read_experiment(folder)) == (
        "None of 3 points reached 95.00% test accuracy within its budget."
    )
    assert {c[1] for c in page.tables["All searched points"][1:]} == {"> budget"}
    assert "nan" not in {cell for table in page.tables.values() for r in table for cell in r}


def test_search_whose_trials_all_failed_says_so(tmp_path: Path) -> None:
    found = [r | {"status": "failed", "reached": "false", "objective": ""} for r in rows(1, 3)]
    folder = write_search(tmp_path / "search", found, runs=False, best_config=None)
    experiment = read_experiment(folder)
    assert experiment.best is None
    assert headline(experiment).startswith("No trial finished: 5 failed or were rejected")


def test_winner_is_the_one_that_the_search_names(tmp_path: Path) -> None:
    found = rows(seeds=1, points=4)
    folder = write_search(tmp_path / "search", found, runs=False, best="p001-s0")
    best = read_experiment(folder).best
    assert best is not None and best.name == "1"


def test_confirmation_with_unseen_seeds_is_what_the_headline_speaks_of(tmp_path: Path) -> None:
    found = rows(seeds=1, points=3)
    for name, seconds in (("best", 4.0), ("sgd", 10.0)):
        for seed in (1000, 1001, 1002):
            cells = {"trial_id": f"confirm-{name}-{seed}", "stage": "confirm"}
            cells |= {"point": f"confirm-{name}", "status": "finished", "reached": "true"}
            found.append(row(**cells, seed=seed, objective=seconds + (seed - 1001) / 10))
    folder = write_search(tmp_path / "search", found, runs=False)
    assert headline(read_experiment(folder)) == (
        "The best configuration reaches 95.00% test accuracy in 4.0 s of training (median of 3 "
        "unseen seeds), 2.50 times faster than sgd (10.0 s)."
    )


def test_median_repeat_of_an_even_number_is_the_worse_in_the_middle(tmp_path: Path) -> None:
    def point(*values: float | None) -> Point:
        trials = [
            row(
                trial_id=f"t{seed}",
                stage="search",
                point=0,
                seed=seed,
                status="finished",
                objective="" if value is None else value,
                reached="false" if value is None else "true",
                best_value=0.9,
            )
            for seed, value in enumerate(values)
        ]
        target = tmp_path / "-".join(map(str, values))
        return read_experiment(write_search(target, trials, runs=False)).points[0]

    assert point(5.0, 3.0).value == 5.0
    assert point(4.0, 3.0, 9.0).value == 4.0
    assert point(None, 3.0).value is None
    assert point(None, 3.0, 4.0).value == 4.0
    assert point(None, 3.0, 4.0).values == [3.0, 4.0]


def test_run_folders_outside_the_search_are_not_read(tmp_path: Path) -> None:
    found = rows(seeds=1, points=2)
    write_search(tmp_path / "other", found)
    for each in found:
        each["run_folder"] = f"../other/{each['run_folder']}"
    folder = write_search(tmp_path / "search", found, runs=False)
    assert not any(trial.evaluations for trial in read_experiment(folder).trials.values())


def test_reading_takes_evaluations_and_resizes_from_the_run_folders(
    folder: Path, found: list[dict[str, Any]]
) -> None:
    for trial, each in zip(read_experiment(folder).trials.values(), found, strict=True):
        ran = each["started"] != ""
        assert len(trial.evaluations) == (12 if ran else 0)
        if ran:
            assert trial.evaluations[-1].seconds == pytest.approx(each["train_time_s"])
            assert trial.evaluations[-1].value == pytest.approx(each["best_value"])
            assert len(trial.resizes) == (each["seed"] == 1)


def test_eta_squared_is_the_share_between_groups() -> None:
    assert eta_squared([1, 2, 3, 4], ["a", "a", "b", "b"]) == pytest.approx(0.8)
    assert eta_squared([1, 4, 2, 3], ["a", "a", "b", "b"]) == 0.0
    assert eta_squared([2.5] * 4, ["a", "a", "b", "b"]) == 0.0
    # Kruskal and Wallis' H, in the form of their paper, is (n - 1) times it.
    ranks = [5, 2, 8, 3, 4, 9, 6, 7, 1]
    labels = list("aabbccabc")
    n = len(ranks)
    sums = {g: sum(r for r, of in zip(ranks, labels, strict=True) if of == g) for g in "abc"}
    h = 12 / (n * (n + 1)) * sum(sums[g] ** 2 / labels.count(g) for g in sums) - 3 * (n + 1)
    assert eta_squared(ranks, labels) * (n - 1) == pytest.approx(h)


def test_midranks_share_places_and_put_the_missed_target_last() -> None:
    keys = [(0, 2.0), (1, 0.1), (0, 1.0), (0, 2.0), (1, 0.1)]
    assert midranks(keys) == [2.5, 4.5, 1.0, 2.5, 4.5]


def test_chance_is_the_mean_over_all_orders() -> None:
    labels = ["a", "a", "b", "b", "c"]
    shares = [eta_squared(order, labels) for order in itertools.permutations([1, 2, 3, 4, 5])]
    assert statistics.fmean(shares) == pytest.approx((3 - 1) / (5 - 1))


def test_groups_cut_numbers_into_equal_parts_and_never_part_equals() -> None:
    assert groups_of([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert groups_of([5, 1, 4, 2, 3, 6]) == [1, 0, 1, 0, 0, 1]
    assert groups_of([1, 1, 1, 2, 3, 4, 5, 6, 7])[:3] == [0, 0, 0]
    assert groups_of([True, False, True]) == ["True", "False", "True"]
    assert len(set(groups_of([None, 1.0, 2.0, 3.0, 4.0, 5.0]))) == 6


def test_importance_finds_the_parameter_that_the_time_depends_on(folder: Path) -> None:
    shares, count = importances(read_experiment(folder))
    assert count == 13  # 14 points, of which one was refused
    assert shares[0].parameter == "kfac.damping"
    assert shares[0].share > 2 * shares[0].chance
    assert shares[0].chance == pytest.approx(2 / 12)


def test_pareto_front_is_what_no_point_beats() -> None:
    points = [(1.0, 9.0), (2.0, 9.0), (2.0, 5.0), (3.0, 6.0), (4.0, 1.0), (4.0, 2.0), (1.0, 9.0)]
    front = [
        p for p in set(points)
        if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)
    ]  # fmt: skip
    assert pareto_front(points) == sorted(front) == [(1.0, 9.0), (2.0, 5.0), (4.0, 1.0)]


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_folder_that_is_none_is_one_clear_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "experiment.json").write_text(content)
    with pytest.raises(UsageError, match=re.escape(str(tmp_path))):
        write_search_page(tmp_path)


def test_report_command_knows_searches_from_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_search(tmp_path / "tune-1", [], status="interrupted", best_config=None)
    assert main(["report", "tune-1", "--storage", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(f"Report: {folder}/report.html\n")
    with pytest.raises(UsageError, match="name one of its trials"):
        locate_run("tune-1", str(tmp_path))
    assert main(["report", "tune-2", "--storage", str(tmp_path)]) == 2
    assert "did you mean tune-1?" in capsys.readouterr().err


def test_search_of_trials_that_vanished_is_still_drawn(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("trials", "report.html"))
    about = json.loads((copy / "experiment.json").read_text())
    for name in ("space", "hardware", "versions", "references", "objective", "parameters"):
        del about[name]
    (copy / "experiment.json").write_text(json.dumps(about))
    experiment = read_experiment(copy)
    assert list(experiment.parameters) == list(PARAMETERS)
    assert (
        experiment.target == TARGET
        and next(iter(experiment.trials.values())).numbers["started"] == BEGAN
    )
    page = Page(write_search_page(copy).read_text(encoding="utf-8"))
    assert page.open == [] and tuple(page.headings) == ORDER
