"""Dashboards and rules: they parse, they read what exists, they show everything we export."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deployment.manifests import ROOT, documents
from deployment.promql import Expression, Selector, parse
from elastic_kfac.observability.metric_names import METRICS, Metric, label
from support.metrics import prometheus_name

FOLDER = ROOT / "dashboards"
DASHBOARDS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(FOLDER.glob("*.json"))
}
RULES = [
    rule
    for name in ("recording", "alerts")
    for group in documents(FOLDER / "rules" / f"{name}.yaml")[0]["groups"]
    for rule in group["rules"]
]
OURS = {prometheus_name(entry): entry for entry in METRICS}
RECORDED = {rule["record"]: rule for rule in RULES if "record" in rule}
RAY_LABELS = {"ray_train_run_name", "ray_train_controller_state"}
SECONDS, BYTES = {"s"}, {"bytes"}
SHARES = {"percentunit"}


def ray_metrics() -> set[str]:
    """What we use of Ray's own metrics."""
    lines = (FOLDER / "ray_metrics.txt").read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def panels() -> list[tuple[str, dict[str, Any]]]:
    return [(name, panel) for name, board in DASHBOARDS.items() for panel in board["panels"]]


def expressions() -> list[tuple[str, str]]:
    """Every expression, with where it stands."""
    found = [
        (f"{name}: {panel['title']}", target["expr"])
        for name, panel in panels()
        for target in panel["targets"]
    ]
    return found + [(rule.get("record") or rule["alert"], rule["expr"]) for rule in RULES]


def unknown_names(expression: Expression) -> list[str]:
    """Metrics that nobody exports, labels that a metric has not, values that a label never takes."""
    found = []
    for selector in expression.selectors:
        entry = OURS.get(selector.metric)
        if entry is None:
            if selector.metric not in RECORDED and selector.metric not in ray_metrics():
                found.append(f"metric {selector.metric}")
            continue
        for name, value in selector.matchers:
            if name not in entry.labels:
                found.append(f"label {name} of {selector.metric}")
            elif label(name).values and set(value.split("|")) - set(label(name).values):
                found.append(f"value {value} of {name}")
    known = {name for s in expression.selectors for name in _labels(s)}
    return found + [f"label {name}" for name in sorted(expression.grouped_by - known)]


def _labels(selector: Selector) -> set[str]:
    entry = OURS.get(selector.metric)
    if entry is not None:
        return set(entry.labels)
    return {"run"} if selector.metric in RECORDED else RAY_LABELS


def misused(expression: Expression) -> list[str]:
    """Counters without a rate, rates of gauges."""
    found = []
    for selector in expression.selectors:
        entry = OURS.get(selector.metric)
        over_time = selector.function in ("rate", "increase")
        if entry is not None and (entry.kind == "counter") != over_time:
            found.append(f"{entry.kind} {selector.metric} under {selector.function or 'nothing'}")
    return found


def fitting_units(entry: Metric, function: str, text: str) -> set[str]:
    """Units in which a panel may show a metric."""
    if " / " in text or (function == "rate" and entry.unit == "s"):
        return SHARES
    if function == "rate":
        return {"Bps"} if entry.unit == "bytes" else {"cps", "ops"}
    if function == "increase":
        return {"short"}
    return {"s": SECONDS, "bytes": BYTES, "samples/s": {"cps"}, "": {"short", "percentunit"}}.get(
        entry.unit, {"short"}
    )


@pytest.mark.parametrize(("where", "text"), expressions(), ids=lambda value: value[:50])
def test_expression_parses_and_reads_what_exists(where: str, text: str) -> None:
    expression = parse(text)
    assert expression.selectors, where
    assert unknown_names(expression) == []
    assert misused(expression) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("ray_kfac_train_lss", "metric ray_kfac_train_lss"),
        ("max by (tag) (ray_kfac_train_loss)", "label tag"),
        ('ray_kfac_train_loss{rank="0"}', "label rank of ray_kfac_train_loss"),
        ('ray_kfac_train_run_state{state=~"running|runing"}', "value running|runing of state"),
        ("ray_node_cpu_utilisation", "metric ray_node_cpu_utilisation"),
        ("run:kfac_typo:rate5m", "metric run:kfac_typo:rate5m"),
        ("ray_kfac_train_loss and on (rank) ray_kfac_train_lr", "label rank"),
    ],
)
def test_wrong_names_are_seen(text: str, complaint: str) -> None:
    assert unknown_names(parse(text)) == [complaint]


def test_misused_kinds_are_seen() -> None:
    assert misused(parse("ray_kfac_train_samples_total"))
    assert misused(parse("sum(rate(ray_kfac_train_loss[$__rate_interval]))"))
    assert misused(parse("sum(rate(ray_kfac_train_samples_total[5m]))")) == []


def test_nonsense_does_not_parse() -> None:
    for text in ("sum by run (x", "rate(x)", "x[5m", "x{a=}", "histogram(x)"):
        with pytest.raises(ValueError, match=r"."):
            parse(text)


def test_every_metric_of_ours_is_on_a_panel() -> None:
    shown = {
        selector.metric
        for _, panel in panels()
        for target in panel["targets"]
        for selector in parse(target["expr"]).selectors
    }
    assert set(OURS) - shown == set()


def test_every_listed_metric_of_ray_is_used() -> None:
    used = {selector.metric for _, text in expressions() for selector in parse(text).selectors}
    assert ray_metrics() - used == set()


def test_ray_train_exports_what_we_use_of_it() -> None:
    from ray.train.v2._internal.metrics.controller import ControllerMetrics

    exported = {f"ray_{value}" for name, value in vars(ControllerMetrics).items() if name.isupper()}
    assert ray_metrics() <= exported


@pytest.mark.parametrize("name", DASHBOARDS)
def test_dashboard_is_built_like_the_others(name: str) -> None:
    board = DASHBOARDS[name]
    assert board["uid"] == f"elastic-kfac-{name}"
    assert board["schemaVersion"] >= 39
    assert "id" not in board
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert set(OURS) & set(re.findall(r"\w+", variables["run"]["definition"]))
    assert 1 <= len(board["panels"]) <= 12
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert len({panel["title"] for panel in board["panels"]}) == len(board["panels"])
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]}
    assert len(places) == len(board["panels"])


@pytest.mark.parametrize(
    ("board", "panel"), panels(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_panel_says_what_it_shows_in_which_unit(board: str, panel: dict[str, Any]) -> None:
    assert panel["type"] == "timeseries"
    assert len(panel["description"]) > 20
    assert panel["datasource"]["uid"] == "${datasource}"
    unit = panel["fieldConfig"]["defaults"]["unit"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        text = target["expr"]
        assert target["datasource"]["uid"] == "${datasource}"
        assert "[$__rate_interval]" in text or "[" not in text
        shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        expression = parse(text)
        assert shown <= expression.grouped_by
        for selector in expression.selectors:
            entry = OURS.get(selector.metric)
            if entry is None:
                continue
            assert ("run", "$run") in selector.matchers
            if "time()" not in text:
                assert unit in fitting_units(entry, selector.function, text), text
            else:
                assert unit == "s"


def test_alerts_say_what_happened_and_what_to_do() -> None:
    alerts = [rule for rule in RULES if "alert" in rule]
    assert {rule["alert"] for rule in alerts} >= {
        "KfacTrainingStalled",
        "KfacResizeStorm",
        "KfacNonFiniteFactors",
        "KfacCheckpointTooOld",
    }
    for rule in alerts:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert "{{ $labels.run }}" in rule["annotations"]["summary"]
        assert len(rule["annotations"]["description"]) > 40


def test_every_rule_has_a_unit_test() -> None:
    text = "".join(
        path.read_text(encoding="utf-8") for path in (FOLDER / "rules" / "tests").glob("*.yaml")
    )
    for rule in RULES:
        name = rule.get("alert") or rule["record"]
        assert f"alertname: {name}" in text or f"expr: {name}" in text


def test_installed_rules_are_the_tested_ones() -> None:
    path = ROOT / "k8s" / "monitoring" / "prometheus-rule.yaml"
    installed = documents(path)[0]["spec"]["groups"]
    written = [
        group
        for name in ("recording", "alerts")
        for group in documents(FOLDER / "rules" / f"{name}.yaml")[0]["groups"]
    ]
    assert installed == written


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("promtool")
    assert tool, "these tests need promtool 2.42 or newer (Debian: prometheus)"
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.tools
def test_promtool_accepts_and_passes_the_rules() -> None:
    rules = sorted((FOLDER / "rules").glob("*.yaml"))
    checked = promtool("check", "rules", *rules)
    assert checked.returncode == 0, checked.stderr
    tested = promtool("test", "rules", *sorted((FOLDER / "rules" / "tests").glob("*.yaml")))
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.tools
@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        (
            "alerts",
            "unless on (run) run:kfac_samples:rate5m > 0",
            "and run:kfac_samples:rate5m == 0",
        ),
        ("alerts", "[30m])) > 6", "[30m])) > 9"),
        ("alerts", "nonfinite_factors_total[10m])) > 0", "nonfinite_factors_total[10m])) > 1"),
        ("alerts", "seconds > 1800 and", "seconds > 1800 or"),
        ("alerts", "> on (run) max", "< on (run) max"),
        ("recording", "avg by (run)", "sum by (run)"),
        ("recording", "running|draining", "running"),
    ],
)
def test_rule_tests_notice_a_changed_rule(
    tmp_path: Path, rule: str, right: str, wrong: str
) -> None:
    shutil.copytree(FOLDER / "rules", tmp_path / "rules")
    file = tmp_path / "rules" / f"{rule}.yaml"
    text = file.read_text(encoding="utf-8")
    assert text.count(right) == 1
    file.write_text(text.replace(right, wrong), encoding="utf-8")
    tested = promtool("test", "rules", *sorted((tmp_path / "rules" / "tests").glob("*.yaml")))
    assert tested.returncode != 0
