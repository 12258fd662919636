"""Outcomes of studies: values by cell, tables in the published form, claims, CSV, page."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_kfac.config import Config
from elastic_kfac.experiments.study import COLUMNS, Cell, Place, Study, load_study
from elastic_kfac.experiments.study_outcome import (
    Outcome,
    cells_csv,
    number_text,
    outcome_text,
    summary_csv,
    summary_text,
    table_text,
    tables,
    to_json,
    trial_of_cell,
)
from elastic_kfac.experiments.study_statistics import Summary, paired_interval
from elastic_kfac.experiments.trials import DIVERGED, FINISHED, TrialTable
from elastic_kfac.reports.study_page import render_study

STUDY: dict[str, Any] = {
    "title": "Two & three",
    "base": {},
    "methods": {"BL": {}, "ABS": {"batch_sizes": [256]}},
    "batch_sizes": [32, 256],
    "seeds": [0, 1, 2],
    "columns": ["accuracy", "updates", "lambda_1", "time_s"],
    "assertions": [
        {
            "says": "ABS gains",
            "column": "accuracy",
            "compare": ["ABS@256 - BL@256"],
            "at_least": 0.01,
        },
        {"says": "fewer", "column": "updates", "compare": ["ABS@256 - BL@32"], "below": 0},
        {"says": "sharper", "column": "lambda_1", "compare": ["BL@256 / BL@32"], "above": 1},
        {
            "says": "on the whole",
            "column": "accuracy",
            "compare": ["BL@32 - BL@256", "ABS@256 - BL@256"],
            "above": 0,
            "over": "mean",
        },
    ],
}

ACCURACY = {
    "BL@32": (0.95, 0.94, 0.96),
    "BL@256": (0.90, 0.90, 0.92),
    "ABS@256": (0.94, 0.93, 0.96),
}
UPDATES = {"BL@32": (5760, 5760, 5760), "BL@256": (720, 720, 720), "ABS@256": (1500, 1504, 1508)}
LAMBDA = {"BL@32": (0.01, 0.02, 0.01), "BL@256": (0.6, 0.8, 0.7), "ABS@256": (0.02, 0.02, 0.03)}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return load_study(path).study


def result(place: str, seed: int) -> dict[str, Any]:
    return {
        "status": FINISHED,
        "accuracy": ACCURACY[place][seed],
        "steps": UPDATES[place][seed],
        "lambda_1": LAMBDA[place][seed],
        "train_time_s": 3.5,
        "final_state_sha256": "0",
    }


@pytest.fixture
def outcome(study: Study) -> Outcome:
    return lost(study, {})


def lost(study: Study, which: dict[str, Any]) -> Outcome:
    """The outcome where cells by name have another result or none."""
    table = TrialTable()
    for seed in study.seeds:
        for place in study.places():
            found = which.get(f"{place} {seed}", result(str(place), seed))
            table.add(trial_of_cell(Cell(place, seed, Config()), found))
    return Outcome("two", study, table)


def test_first_table_has_accuracy_and_updates_in_the_published_form(outcome: Outcome) -> None:
    table = tables(outcome)[0]
    assert table.title == "test accuracy, % / updates"
    assert table.head == ("B", "BL", "ABS")
    # Mean and sample deviation of (0.95, 0.94, 0.96), of (1500, 1504, 1508), by hand.
    assert table.rows == (
        ("32", "95.00 ± 1.00 / 5,760", "–"),
        ("256", "90.67 ± 1.15 / 720", "94.33 ± 1.53 / 1,504 ± 4"),
    )
    assert [t.title for t in tables(outcome)[1:]] == [
        "top Hessian eigenvalue λ₁",
        "training time, s",
    ]


def test_claims_are_judged_by_the_paired_interval_of_their_cells(outcome: Outcome) -> None:
    gains, fewer, sharper, whole = outcome.claims()
    expected = paired_interval(
        dict(enumerate(ACCURACY["ABS@256"])), dict(enumerate(ACCURACY["BL@256"]))
    )
    assert gains.comparisons[0].interval == expected
    assert [claim.verdict for claim in (gains, fewer, sharper)] == ["holds", "holds", "holds"]
    assert sharper.comparisons[0].interval is not None
    assert sharper.comparisons[0].interval.mean == pytest.approx(
        (0.6 * 0.8 * 0.7 / (0.01 * 0.02 * 0.01)) ** (1 / 3)
    )
    # By seed the means over both differences are (.05+.04)/2, (.04+.03)/2 and (.04+.04)/2.
    assert whole.pooled is not None
    assert whole.pooled.mean == pytest.approx(0.04)
    assert whole.pooled.high is not None
    assert whole.pooled.high - 0.04 == pytest.approx(4.302653 * 0.005 / math.sqrt(3), rel=1e-5)


def test_diverged_cell_shows_in_the_table_and_leaves_the_claim_to_the_other_seeds(
    study: Study,
) -> None:
    told = {"status": DIVERGED, "error": "loss is not finite in step 7", "steps": 7}
    outcome = lost(study, {"ABS@256 1": told})
    assert tables(outcome)[0].rows[1][2] == "95.00 ± 1.41 / 1,504 ± 5.7 (1 diverged)"
    interval = outcome.claims()[0].comparisons[0].interval
    assert interval is not None and interval.count == 2
    assert "ABS@256 seed 1 diverged: loss is not finite in step 7" in outcome_text(outcome)


def test_claim_whose_cells_are_all_missing_is_undecided(study: Study) -> None:
    outcome = lost(study, {f"ABS@256 {seed}": None for seed in study.seeds})
    claim = outcome.claims()[0]
    assert (claim.verdict, claim.comparisons[0].interval) == ("undecided", None)
    assert tables(outcome)[0].rows[1][2] == "(3 waiting)"
    assert "no value on both sides" in outcome_text(outcome)


def test_numbers_of_tables_keep_three_digits_and_huge_ones_their_power() -> None:
    number = COLUMNS["train_loss"]
    assert number_text(number, 0.00012345) == "0.00012"
    assert number_text(number, 3.14159) == "3.14"
    assert number_text(number, 4321.9) == "4322"
    assert number_text(number, 1.25e30) == "1.25e+30"
    assert summary_text(number, Summary(0.13, 0.0091, 2)) == "0.130 ± 0.009"
    assert summary_text(COLUMNS["updates"], Summary(720.0, 0.0, 5)) == "720"
    assert summary_text(COLUMNS["accuracy"], None) == "–"


def test_terminal_table_has_straight_columns(outcome: Outcome) -> None:
    lines = table_text(tables(outcome)[0]).splitlines()[1:]
    assert len({len(line) for line in lines}) == 1


def test_csv_files_hold_every_cell_and_every_mean(outcome: Outcome) -> None:
    cells = list(csv.DictReader(io.StringIO(cells_csv(outcome))))
    assert len(cells) == 9
    assert cells[0]["method"] == "BL" and float(cells[0]["accuracy"]) == 0.95
    rows = list(csv.DictReader(io.StringIO(summary_csv(outcome))))
    abs_row = next(row for row in rows if row["method"] == "ABS")
    assert float(abs_row["updates_mean"]) == 1504 and abs_row["updates_n"] == "3"
    assert float(abs_row["updates_std"]) == pytest.approx(4.0)


def test_json_holds_verdicts_and_intervals(outcome: Outcome) -> None:
    values = to_json(outcome)
    assert values["cells"] == {"finished": 9, "diverged": 0, "failed": 0, "waiting": 0}
    first = values["claims"][0]
    assert first["verdict"] == "holds"
    assert first["comparisons"][0]["compare"] == "ABS@256 − BL@256"
    assert first["comparisons"][0]["interval"]["count"] == 3


def test_page_needs_no_network_escapes_and_says_what_became_of_the_claims(
    outcome: Outcome,
) -> None:
    page = render_study(outcome, {"python": "3.11", "processor": "a <fast> one"})
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "Two &amp; three: 9 trainings; 4 of 4 claims hold." in page
    assert "a &lt;fast&gt; one" in page
    assert page.count("<svg") == 1
    assert "94.33 ± 1.53 / 1,504 ± 4" in page
    assert render_study(outcome, {"python": "3.11", "processor": "a <fast> one"}) == page


def test_page_of_a_study_that_has_only_begun_is_whole(study: Study) -> None:
    nothing = {f"{place} {seed}": None for place in study.places() for seed in study.seeds}
    page = render_study(lost(study, nothing), {})
    assert "0 of 9 trainings; 0 of 4 claims hold, 4 undecided." in page
    assert "no values" in page


def test_place_is_written_as_in_comparisons() -> None:
    assert str(Place("ABS", 256)) == "ABS@256"
