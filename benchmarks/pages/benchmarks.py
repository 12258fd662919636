"""docs/benchmarks.md: every result file, what wrote it, where and when."""

from __future__ import annotations

import datetime
import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from pages.values import RESULTS, ROOT, load

DOCUMENT = "docs/benchmarks.md"

COMMANDS: dict[str, str] = {
    "changes_in_place": "python benchmarks/elastic/changes_in_place.py",
    "chaos": "python benchmarks/elastic/chaos.py",
    "chaos_shared_cores": "python benchmarks/elastic/chaos.py --shared-cores",
    "cifar10_jpeg": "python benchmarks/studies/cifar10_jpeg.py",
    "clusters10": "elastic-kfac compare benchmarks/studies/clusters10.yaml",
    "damping_follows": "python benchmarks/defaults/run.py (damping_follows_*)",
    "damping_rules": "python benchmarks/defaults/run.py (candidates.yaml)",
    "data": "python benchmarks/data/bench_data.py",
    "defaults": "python benchmarks/defaults/run.py",
    "defaults_variants": "python benchmarks/defaults/run.py (ekfac, one_sided, rare)",
    "dist_newton": "python benchmarks/studies/dist_newton.py",
    "elastic_recovery": "python benchmarks/elastic_recovery.py",
    "fisher": "python benchmarks/studies/fisher.py",
    "hessian_cost": "python benchmarks/hessian_cost.py",
    "in_place_gaps": "python benchmarks/in_place_gaps.py",
    "kfac_step": "python benchmarks/kfac_step.py",
    "kfac_vs_sgd": "elastic-kfac compare benchmarks/studies/kfac_vs_sgd.yaml",
    "membership_schedules": "pytest -m soak tests/unit/training/test_membership_schedules.py",
    "momentum_placement": "python benchmarks/defaults/run.py (momentum_before)",
    "plan_time": "python benchmarks/plan_time.py",
    "planner_accuracy": "python benchmarks/planner/accuracy.py",
    "planner_decomposers": "python benchmarks/planner/decomposers.py",
    "planner_figures": "python benchmarks/planner/figures.py",
    "recipes": "python benchmarks/studies/recipes.py",
    "reproducible_cost": "python benchmarks/reproducible_cost.py",
    "robust_spectra": "python benchmarks/studies/robust_spectra.py",
    "row_log_cost": "python benchmarks/row_log_cost.py",
    "schedules": "python benchmarks/studies/schedules.py",
    "slow_rank": "python benchmarks/elastic/slow_rank.py",
    "spot_replay": "python benchmarks/elastic/spot_replay.py --real-minutes 10",
    "start_up": "python benchmarks/start_up.py --against PLATFORM_OF_ANOTHER_CHECKOUT",
    "story": "python benchmarks/elastic/story.py",
    "suggested": "python benchmarks/suggested.py",
    "telemetry_cost": "python benchmarks/telemetry_cost.py",
    "time_to_accuracy": "python benchmarks/time_to_accuracy/run.py --data FOLDER",
    "tuned_against_tuned": "python benchmarks/tuned_against_tuned.py",
    "vault_cost": "python benchmarks/vault_cost.py",
    "wide_layers": "python benchmarks/wide_layers.py",
    "wire_formats": "python benchmarks/studies/wire_formats.py",
    "workloads": "python benchmarks/workloads.py",
}
"""What wrote each file."""


def names() -> list[str]:
    """The result files."""
    return sorted(path.stem for path in (ROOT / RESULTS).glob("*.json"))


def text(dates: Mapping[str, str]) -> str:
    """docs/benchmarks.md; `dates` by file, for those that record none."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python benchmarks/claims.py --write`. `make verify-claims` computes every measured",
        "number in README and docs from these files and fails on one that is stale, missing or without a",
        "file; `make bench-smoke` runs every benchmark at a tiny size. n counts the repetitions (seeds,",
        "steps, changes) behind a number; the date is that of the file.",
        "",
        "| file | command | machine | n | date | versions |",
        "|---|---|---|---|---|---|",
    ]
    for name in names():
        found = load(name)
        link = f"[{name}](../{RESULTS}/{name}.json)"
        lines.append(
            f"| {link} | `{COMMANDS[name]}` | {_machine(found)} | {_repetitions(found)} | "
            f"{found.get('date') or dates.get(name, 'today')} | {_versions(found)} |"
        )
    return "\n".join(lines) + "\n"


def dates_in(page: str) -> dict[str, str]:
    """The dates that docs/benchmarks.md has."""
    return dict(re.findall(r"^\| \[(\w+)\].* \| (\d{4}-\d\d-\d\d) \|", page, re.MULTILINE))


def dates_of_commits() -> dict[str, str]:
    """When each result was last committed; today for one that has changed since."""
    found = {}
    for name in names():
        path = ROOT / RESULTS / f"{name}.json"
        command = ["git", "-C", str(ROOT), "log", "-1", "--format=%cs", "--", str(path)]
        changed = ["git", "-C", str(ROOT), "status", "--porcelain", "--", str(path)]
        date = "" if _said(changed) else _said(command)
        found[name] = date or datetime.date.today().isoformat()
    return found


def _said(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _repetitions(found: Mapping[str, Any]) -> str:
    """`3`, or `3 to 30` where numbers of a file have different ones."""
    counts = set(_counts(found))
    runs = found.get("runs")
    if not counts and isinstance(runs, list):
        counts = {len(runs)}
    elif not counts and isinstance(runs, dict):  # Named by problem, method, seed, …
        parts = [{p for p in key.split(" | ") if p.isdecimal()} for key in runs]
        counts = {len(set().union(*parts))}
    if not counts:
        return "not recorded"
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _counts(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for part in value:
            yield from _counts(part)
    elif isinstance(value, dict):
        named = next((key for key in ("n", "seeds", "rounds") if key in value), None)
        if named is not None and isinstance(value[named], int):
            yield value[named]
        for key, part in value.items():
            if key == "interval" and isinstance(part, dict) and "count" in part:
                yield part["count"]
            elif key != "p99":  # Of single steps.
                yield from _counts(part)


def _machine(found: Mapping[str, Any]) -> str:
    for key in ("machine", "hardware", "provenance"):
        if part := found.get(key):
            return _listed(part)
    return str(found.get("basis", "not recorded"))


def _listed(part: Any) -> str:
    if isinstance(part, str):
        return part
    known = ("cpu", "device", "processor", "system", "cores", "cpus", "threads")
    shown = [
        f"{part[key]} {key}" if isinstance(part[key], int) else str(part[key])
        for key in known
        if key in part
    ]
    return ", ".join(shown) or "not recorded"


def _versions(found: Mapping[str, Any]) -> str:
    part = found.get("versions") or found.get("provenance", {}).get("versions") or found
    shown = [f"{key} {part[key]}" for key in ("torch", "ray") if isinstance(part.get(key), str)]
    return ", ".join(shown) or "not recorded"
