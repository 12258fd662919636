"""CPU time that measuring and exporting cost, as a share of the CPU time of the steps.

One rank trains the digits job in this process, exporting to a real Ray on this machine; the run's
exporter (the coordinator's part) lives here, too, and gets the same rows as in a run. CPU times are the
thread's own (`time.thread_time`), so that other load on the machine does not count. The points of a
step are counted apart: their cost per call is timed in a loop and multiplied by the calls.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.metrics import Gauge

from elastic_kfac.cli.entry import main as elastic_kfac
from elastic_kfac.cluster.run.reporting import MetricsExport
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import apply_overrides, parse_config, read_config
from elastic_kfac.observability.telemetry import (
    RankTelemetry,
    RunTelemetry,
    TelemetryOptions,
)
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.training.callbacks import Callbacks, FolderWriter, KeepGoing, Point
from elastic_kfac.training.loop import run_rank
from elastic_kfac.training.measurement import RankProbe

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "telemetry_cost.json"
LIMIT = 0.005


class CountingProbe(RankProbe):
    """A probe that counts how often it is called."""

    calls = 0

    def on_point(self, point: Point, step: int) -> None:
        self.calls += 1
        super().on_point(point, step)


class CoordinatorRows(FolderWriter):
    """The coordinator's part of the telemetry beside a run's folder, with its CPU time."""

    def __init__(self, folder: RunFolder, run: RunTelemetry) -> None:
        super().__init__(folder)
        self.run = run
        self.cpu_s = 0.0

    def on_step(self, row: Mapping[str, Any]) -> None:
        begin = time.thread_time()
        self.run.stepped(row)
        self.cpu_s += time.thread_time() - begin

    def measured(self, values: Any) -> None:
        begin = time.thread_time()
        self.run.measured(values)
        # What its thread does once a second.
        self.run.flush()
        self.cpu_s += time.thread_time() - begin


def measure(epochs: float, folder: Path) -> dict[str, Any]:
    """Trains, and returns CPU seconds of the steps and of measuring."""
    shards = folder / "digits"
    assert elastic_kfac(["shards", "make", "--source", "digits", "--out", str(shards)]) == 0
    base = read_config(str(ROOT / "jobs" / "configs" / "digits.yaml"), [])
    changes = [("data.shards", str(shards)), ("train.epochs", epochs)]
    config = parse_config(apply_overrides(base.model_dump(), changes))
    options = TelemetryOptions("telemetry-cost", 1, 2)
    rows = CoordinatorRows(RunFolder(folder / "run"), RunTelemetry(options, Gauge))
    probe = CountingProbe()
    with probe.own_cpu():
        telemetry = RankTelemetry(options, 0, Gauge)
    export = MetricsExport(probe, telemetry, rows.measured)
    begin = time.perf_counter()
    outcome = run_rank(
        config,
        Communicator.solo(),
        store=CheckpointStore(folder / "run"),
        callback=Callbacks(probe, export, rows),
        control=KeepGoing(),
    )
    elapsed_s = time.perf_counter() - begin
    export.export()
    rank = probe.rank_values()
    alone = RankProbe()
    repeats = 20_000
    begin_cpu = time.thread_time()
    for _ in range(repeats):
        alone.on_point("backward_done", 1)
    moments_s = (time.thread_time() - begin_cpu) / repeats * probe.calls
    step_cpu_s = rank["step_cpu_s"][()]
    # The rank's export hands the run's values over inside its own accounting.
    exporting_s = rank["telemetry_cpu_s"][()]
    rows_s = max(0.0, rows.cpu_s)
    return {
        "steps": outcome.progress.step,
        "elapsed_s": round(elapsed_s, 2),
        "step_cpu_s": round(step_cpu_s, 3),
        "exporting_cpu_s": round(exporting_s, 5),
        "recorder_cpu_s": round(rows_s, 5),
        "moments_cpu_s": round(moments_s, 5),
        "share": round((exporting_s + rows_s + moments_s) / step_cpu_s, 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=120.0)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    results = []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(arguments.epochs, Path(folder)))
        print(results[-1], flush=True)
    ray.shutdown()
    shares = sorted(result["share"] for result in results)
    value = {
        "what": "CPU time of telemetry over CPU time of steps; digits with K-FAC, one rank",
        "limit": LIMIT,
        "share_median": shares[len(shares) // 2],
        "share_max": shares[-1],
        "within_limit": shares[-1] <= LIMIT,
        "runs": results,
        "hardware": f"{platform.machine()}, {os.cpu_count()} shared cores",
        "load": round(os.getloadavg()[0], 1),
        "versions": {"torch": torch.__version__, "ray": ray.__version__},
    }
    RESULT.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in value.items() if k != "runs"}, indent=1))


if __name__ == "__main__":
    main()
