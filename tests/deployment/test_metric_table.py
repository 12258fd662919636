"""The table of metrics: names by convention, labels with bounds, room for few series."""

from __future__ import annotations

import re

import pytest

from elastic_kfac.observability.metric_names import (
    LABELS,
    METRICS,
    OTHER,
    Label,
    Metric,
    label,
    metric,
)
from support.metrics import most_series, prometheus_name

MOST_SERIES = 2_000
"""Series of one metric and one run; Prometheus feels it from about a million over all."""


@pytest.mark.parametrize("entry", METRICS, ids=lambda entry: entry.column)
def test_name_unit_and_kind_agree(entry: Metric) -> None:
    name = prometheus_name(entry)
    assert re.fullmatch(r"ray_kfac_[a-z][a-z_]*[a-z]", name)
    assert name.endswith("_total") == (entry.kind == "counter")
    bare = name.removesuffix("_total")
    assert bare.endswith("_seconds") == (entry.unit == "s")
    assert bare.endswith("_bytes") == (entry.unit == "bytes")
    assert "__" not in name
    assert entry.help.endswith(".")


@pytest.mark.parametrize("entry", METRICS, ids=lambda entry: entry.column)
def test_labels_are_known_and_bounded(entry: Metric) -> None:
    assert entry.labels[0] == "run"
    assert len(set(entry.labels)) == len(entry.labels)
    assert ("rank" in entry.labels) == (entry.exporter == "rank")
    assert most_series(entry) // (label("run").most + 1) <= MOST_SERIES


def test_names_are_unique() -> None:
    assert len({prometheus_name(entry) for entry in METRICS}) == len(METRICS)
    assert len({entry.column for entry in METRICS}) == len(METRICS)
    assert len({entry.name for entry in LABELS}) == len(LABELS)


def test_every_label_is_used() -> None:
    assert {name for entry in METRICS for name in entry.labels} == {e.name for e in LABELS}


def test_every_area_is_measured() -> None:
    areas = {entry.area for entry in METRICS}
    assert areas == {"train", "curvature", "communication", "elastic", "data"}


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("step_time_s", "kfac_train_step_time_seconds"),
        ("samples_per_s", "kfac_train_samples_per_second"),
        ("samples", "kfac_train_samples_total"),
        ("communication_exposed_s", "kfac_communication_exposed_seconds_total"),
        ("train_time_s", "kfac_train_time_seconds"),
    ],
)
def test_exported_name_has_base_units_and_no_repetition(column: str, name: str) -> None:
    assert metric(column).exported_name == name


def test_open_label_folds_what_is_too_much() -> None:
    few = Label("x", "X.", most=2)
    assert [few.admit(v, ()) for v in ("a", "b")] == ["a", "b"]
    assert few.admit("c", {"a", "b"}) == OTHER
    assert few.admit("a", {"a", "b"}) == "a"


def test_closed_label_folds_what_it_does_not_know() -> None:
    assert label("change").admit("resize", ()) == "resize"
    assert label("change").admit("earthquake", ()) == OTHER


def test_unknown_label_is_an_error() -> None:
    with pytest.raises(KeyError):
        label("rnak")
