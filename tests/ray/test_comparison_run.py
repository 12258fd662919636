"""A study is killed in the middle and run again: finished cells stay, the others get their results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import UsageError
from elastic_kfac.experiments.study import load_study
from elastic_kfac.experiments.study_outcome import Outcome
from elastic_kfac.experiments.study_runner import compare
from elastic_kfac.experiments.trials import DIVERGED, FAILED, FINISHED
from elastic_kfac.reports.study_page import render_study
from elastic_kfac.state.claim import claimed
from elastic_kfac.state.run_folder import RunFolder
from support.lines import SilentLine

DRIVER = """
import sys
from elastic_kfac.cli.entry import main
sys.exit(main(sys.argv[1:]))
"""


def write_study(folder: Path, digits: Path, **changes: Any) -> Path:
    values = {
        "base": {
            "data": {"shards": str(digits)},
            "model": {"name": "mlp", "arguments": {"hidden": [16]}},
            "train": {"epochs": 3, "eval_every_epochs": 3, "log_every_steps": 5},
            "optimizer": {"lr": 0.05},
            "kfac": {"damping": 0.01, "kl_clip": 1e-4},
            "elastic": {"snapshot_interval_s": 0.2},
        },
        "methods": {"KFAC": {}, "SGD": {"set": {"kfac.enabled": False}}},
        "batch_sizes": [128],
        "seeds": 2,
        "columns": ["accuracy", "updates", "train_loss", "lambda_1", "adversarial_accuracy"],
        "measure": {"hessian_samples": 64, "hessian_steps": 10},
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def until(condition: Any, what: str, seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


@pytest.mark.soak
def test_study_killed_in_the_middle_keeps_finished_cells_and_goes_on_with_the_others(
    tmp_path: Path, digits: Path, cluster: LocalCluster
) -> None:
    # SGD trains for seconds, so that the driver is killed while some cell is under way.
    methods = {"KFAC": {}, "SGD": {"set": {"kfac.enabled": False, "train.epochs": 250}}}
    path = write_study(tmp_path, digits, methods=methods)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "compare", str(path), "--storage", str(tmp_path / "runs")],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    study = tmp_path / "runs" / "tiny"
    cells = study / "cells"
    try:
        until(lambda: snapshots(cells / "SGD-B128-s0"), "a snapshot of the second cell")
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    # The workers end with their driver, and let go of the cell's lock.
    for cell in cells.iterdir():
        with claimed(Storage(cell), "the cell", wait_s=200):
            pass
    finished = {cell.name: written_at(cell) for cell in cells.iterdir() if written_at(cell)}
    begun = [c.name for c in cells.iterdir() if snapshots(c) and c.name not in finished]
    assert "KFAC-B128-s0" in finished and len(finished) < 4

    loaded = load_study(path)
    storage = str(tmp_path / "runs")
    done = compare(
        loaded, name="tiny", storage=storage, render=page, display=SilentLine(), cluster=cluster
    )

    assert sorted(done.trained) == sorted({cell.name for cell in loaded.cells} - set(finished))
    assert {name: written_at(cells / name) for name in finished} == finished
    for name in begun:
        events = RunFolder(cells / name).events()
        assert [e["step"] > 0 for e in events if e["kind"] == "restored"] == [True]
    assert done.outcome.count(FINISHED) == 4 and done.exit_code == 0
    kfac, sgd = loaded.study.places()
    assert set(done.outcome.values(kfac, "updates").values()) == {3 * 12.0}
    assert set(done.outcome.values(sgd, "updates").values()) == {250 * 12.0}
    assert all(len(done.outcome.values(place, "lambda_1")) == 2 for place in (kfac, sgd))
    assert json.loads((study / "comparison.json").read_text())["cells"]["finished"] == 4
    assert (study / "report.html").read_text().startswith("<!doctype html>")
    assert len((study / "cells.csv").read_text().splitlines()) == 5
    again = compare(loaded, name="tiny", storage=storage, render=page, display=SilentLine())
    assert again.trained == () and again.outcome.count(FINISHED) == 4


def page(outcome: Outcome) -> str:
    return render_study(outcome, {})


def snapshots(cell: Path) -> bool:
    return any(cell.glob("checkpoints/*/manifest.json"))


def written_at(cell: Path) -> int | None:
    path = cell / "result.json"
    return path.stat().st_mtime_ns if path.exists() else None


def test_cell_that_fails_or_diverges_is_told_and_does_not_end_the_study(
    tmp_path: Path, digits: Path, cluster: LocalCluster
) -> None:
    methods = {
        "broken": {"set": {"model.arguments": {"layers": 3}}},
        "wild": {"set": {"kfac.enabled": False, "optimizer.lr": 1e30}},
        "SGD": {"set": {"kfac.enabled": False}},
    }
    path = write_study(tmp_path, digits, methods=methods, seeds=1)
    lines: list[str] = []
    done = compare(
        load_study(path, ["tracking.to=[jsonl]"]),
        name="tiny",
        storage=str(tmp_path / "runs"),
        render=page,
        display=SilentLine(lines),
        cluster=cluster,
    )
    status = {trial.point: trial.status for trial in done.outcome.trials.values()}
    assert status == {"broken@128": FAILED, "wild@128": DIVERGED, "SGD@128": FINISHED}
    assert done.exit_code == 1
    said = "\n".join(lines)
    assert "broken@128 seed 0 failed: model.arguments do not fit" in said
    assert "wild@128 seed 0 diverged: loss or gradients are not finite" in said

    tracked = tmp_path / "runs" / "tiny" / "tracking"
    ends = {
        cell.name: json.loads((cell / "values.jsonl").read_text().splitlines()[-1])
        for cell in tracked.iterdir()
    }
    assert ends == {
        f"{method}-B128-s0": {"run": f"tiny/{method}-B128-s0", "event": end}
        for method, end in (("broken", FAILED), ("wild", DIVERGED), ("SGD", FINISHED))
    }

    changed = load_study(path, ["train.epochs=4"])
    try:
        compare(
            changed, name="tiny", storage=str(tmp_path / "runs"), render=page, display=SilentLine()
        )
    except UsageError as error:
        assert "was trained with another configuration" in error.line()
        assert "train.epochs" in error.line()
    else:
        raise AssertionError("a changed study went on with the cells of another one")
