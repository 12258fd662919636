"""The scores of the time-to-accuracy benchmark, worked out by hand."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PROTOCOL = runpy.run_path(str(ROOT / "benchmarks/time_to_accuracy/protocol.py"))


def _run(method: str, study: int, *curve: tuple[int, float, float | None]) -> dict[str, Any]:
    return {"workload": "w", "method": method, "study": study, "point": 0, "curve": list(curve)}


def test_target_is_the_better_methods_median_of_best_finals() -> None:
    finals = {"a": [[0.5, 0.3], [0.4], [0.2, None]], "b": [[0.1], [0.6], [0.7]]}
    runs = [
        _run(method, study, (1, 0.1, 0.0), (2, 0.2, final))
        for method, studies in finals.items()
        for study, points in enumerate(studies)
        for final in points
    ]
    assert PROTOCOL["target"](runs, "w", ["a", "b"]) == 0.3  # a: 0.3, 0.4, 0.2; b: 0.1, 0.6, 0.7
    with pytest.raises(ValueError, match="no run of c"):
        PROTOCOL["target"](runs, "w", ["c"])


def test_a_study_counts_its_fastest_point_and_a_miss_is_infinite() -> None:
    runs = [
        _run("a", 0, (10, 1.0, 0.9), (20, 2.0, 0.4), (30, 3.0, 0.2)),
        _run("a", 0, (10, 5.0, 0.3)),
        _run("a", 1, (10, 1.0, 0.9), (20, 2.0, None)),
    ]
    assert PROTOCOL["score"](runs, "w", "a", 0.4, 0) == [10, math.inf]
    assert PROTOCOL["score"](runs, "w", "a", 0.4, 1) == [2.0, math.inf]


def test_the_seconds_that_count_are_those_of_points_repeated_together() -> None:
    slow_start = _run("a", 0, (10, 8.0, 0.3))
    cheap_steps = _run("a", 0, (10, 1.0, 0.9), (20, 2.0, 0.4))
    neither = _run("a", 0, (10, 1.0, 0.9), (20, 9.0, 0.4))
    other, miss = _run("b", 0, (5, 1.0, 0.2)), _run("b", 1, (5, 1.0, 0.9))
    runs = [slow_start, cheap_steps, neither, other, miss]
    assert PROTOCOL["fastest"](runs, "w", 0.4) == [slow_start, other, cheap_steps]
    slow_start["again"] = {"target": 0.4, "cpu_s": 3.0}
    cheap_steps["again"] = {"target": 0.4, "cpu_s": 4.0}
    assert PROTOCOL["score"](runs, "w", "a", 0.4, 0) == [10]
    assert PROTOCOL["score"](runs, "w", "a", 0.4, 1) == [3.0]
    # A target that has moved since.
    assert PROTOCOL["score"](runs, "w", "a", 0.3, 1) == [8.0]


def test_profile_score_is_the_integral_of_the_profile() -> None:
    times = {
        "one": {"a": 1.0, "b": 2.0, "c": math.inf},
        "two": {"a": 6.0, "b": 2.0, "c": 9.0},
    }
    ratios = PROTOCOL["profile"](times)
    assert ratios == {"a": [1.0, 3.0], "b": [2.0, 1.0], "c": [math.inf, 4.5]}
    # a: on one workload from 1 on, on the other from 3 on: (3 + 1) / 3 / 2.
    assert PROTOCOL["profile_score"](ratios["a"]) == pytest.approx(2 / 3)
    assert PROTOCOL["profile_score"](ratios["c"]) == 0
    taus = [1 + 3 * (i + 0.5) / 3000 for i in range(3000)]
    for method in "abc":
        mean = sum(PROTOCOL["share_within"](ratios[method], t) for t in taus) / len(taus)
        assert PROTOCOL["profile_score"](ratios[method]) == pytest.approx(mean, abs=1e-3)


def test_advantage_is_a_geometric_mean_over_workloads_that_both_finish() -> None:
    times = {
        "one": {"ours": 2.0, "a": 4.0, "b": 8.0},
        "two": {"ours": 4.0, "a": math.inf, "b": 2.0},
        "three": {"ours": math.inf, "a": 1.0, "b": 1.0},
    }
    assert PROTOCOL["advantage"](times, "ours", ["a", "b"]) == pytest.approx(1.0)
    del times["two"]
    assert PROTOCOL["advantage"](times, "ours", ["a", "b"]) == pytest.approx(2.0)
