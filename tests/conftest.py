"""Suite-wide rules: no skip without a committed reason, how tests share the machine's cores, and where
they find real data."""

from __future__ import annotations

import fnmatch
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SKIPS_FILE = Path(__file__).with_name("skips.toml")
SLOW = (
    "unit/cli/test_arguments.py::test_script_of_a_job_*",
    "unit/cli/test_doctor.py::test_examine_*",
    "unit/cli/test_fuzz.py::*",
    "unit/cli/test_runs.py::test_plan_prints_*",
    "unit/cli/test_streams_and_paths.py::*",
    "unit/cli/test_suggest.py::*",
    "unit/cluster/test_coordinator.py::test_coordinator_restart_that_is_retried_*",
    "unit/cluster/test_in_process.py::test_no_part_of_ray_*",
    "unit/cluster/test_resumed_run.py::*",
    "unit/cluster/test_tuning_population.py::*",
    "unit/data/test_cache.py::*",
    "unit/data/test_remote.py::*",
    "unit/data/test_shards.py::test_make_killed_*",
    "unit/optimizers/test_kfac_layers.py::test_compiled_model_*",
    "unit/reports/*",
    "unit/repository/*",
    "unit/training/test_analysis.py::test_analyze_and_probe_*",
    "unit/training/test_curvature_policies.py::test_surrogates_*",
    "unit/training/test_feasibility.py::*",
    "unit/training/test_hostile_input.py::*",
    "unit/training/test_lean_imports.py::*",
    "unit/training/test_mixing.py::test_weights_have_the_moments_*",
    "unit/training/test_object_store.py::*",
    "unit/training/test_recorder.py::test_object_store_that_refuses_*",
    "unit/training/test_workloads.py::*",
    "unit/zoo/test_zoo.py::test_one_step_*",
)
"""Unit tests that start processes, draw figures or take seconds: `make test-fast` leaves them out."""
STAGES = ("ray", "deployment", "distributed", "unit")
"""Folders in the order in which workers take them: the longest one first, many small files last."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", default=None, help="folder of real data sets (ELASTIC_KFAC_DATA)")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, workers take whole files: fixtures of a module or folder are made once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            # One cluster serves the whole folder.
            return "tests/ray" if path.startswith("tests/ray/") else path

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=_stage)
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in SLOW):
            item.add_marker(pytest.mark.slow)


def _stage(item: pytest.Item) -> int:
    folder = item.nodeid.removeprefix("tests/").partition("/")[0]
    return STAGES.index(folder) if folder in STAGES else len(STAGES)


@pytest.fixture(scope="session")
def data_folder(pytestconfig: pytest.Config) -> Path:
    """The folder with `fashion_mnist_train.parquet` and its like; skips where there is none."""
    given = pytestconfig.getoption("--data") or os.environ.get("ELASTIC_KFAC_DATA")
    if not given:
        pytest.skip("--data or ELASTIC_KFAC_DATA is not set")
    folder = Path(given)
    if not folder.is_dir():
        pytest.fail(f"--data / ELASTIC_KFAC_DATA names {folder}, which is not a folder")
    return folder


def allowed_skips(path: Path = SKIPS_FILE) -> list[dict[str, str]]:
    """The committed list: pattern of the node id, pattern of the reason, and why."""
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("skip", [])
    for entry in entries:
        if set(entry) != {"test", "reason", "why"} or not all(entry.values()):
            raise pytest.UsageError(f"{path.name}: an entry needs test, reason and why: {entry}")
    return list(entries)


def why_tolerated(node_id: str, reason: str, entries: list[dict[str, str]]) -> str | None:
    """The `why` of the first entry that covers this skip, None when no entry does."""
    for entry in entries:
        if fnmatch.fnmatchcase(node_id, entry["test"]) and fnmatch.fnmatchcase(
            reason, entry["reason"]
        ):
            return entry["why"]
    return None


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    expected_failure = getattr(report, "wasxfail", None)
    if expected_failure is not None:
        return f"xfail: {expected_failure}"
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


def _judge(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome != "skipped":
        return
    reason = _reason(report)
    if why_tolerated(report.nodeid, reason, allowed_skips()) is not None:
        return
    report.outcome = "failed"
    report.__dict__.pop("wasxfail", None)
    report.longrepr = f"skipped for a reason that is not in {SKIPS_FILE.name}: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    _judge(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    _judge(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.getreports("skipped")
    if skipped:
        entries = allowed_skips()
        terminalreporter.section(f"{len(skipped)} skipped, each with its committed reason")
        for report in skipped:
            reason = _reason(report)
            why = why_tolerated(report.nodeid, reason, entries)
            terminalreporter.write_line(f"SKIPPED {report.nodeid}: {reason} ({why})")
