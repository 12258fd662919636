"""Is the planner right? Predicted against measured steps and memory at 1 to 5 processes.

    python benchmarks/planner/accuracy.py [--out FILE] [--models NAME ...] [--ranks N ...]

Every case is a model, a number of gloo processes, a fraction of gradient workers and intervals. Measured
is the CPU time of the threads that train and decompose (waiting for a peer takes none), per step and
rank; the largest over the ranks is the computation on the critical path: two cores cannot run five ranks
side by side. To both sides the same links are added (10 Gbit/s, 50 µs): bytes and rounds by the traffic
model, whose bytes tests compare with counted ones. Predicted follows from a profile that each rank takes
alone, as `elastic-kfac plan` does, the host's time per collective as ranks measure it when they start,
and shapes. All ranks take theirs at the same time, so that both sides share caches with as many others.
Memory is the most bytes that tensors of a rank held at once.

With `--out`, what an earlier call has measured stays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from elastic_kfac import KFAC, __version__
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config, parse_config
from elastic_kfac.kfac.calibration import host_kind, measured, with_links
from elastic_kfac.placement.choice import choose_plan
from elastic_kfac.placement.devices import NETWORK
from elastic_kfac.placement.simulator import StepTime, device_bytes, predict_step
from elastic_kfac.runs.feasibility import Sized
from elastic_kfac.runs.profile import Profile, measure
from elastic_kfac.runs.profiled_steps import PeakBytes
from elastic_kfac.training.first_order import make_optimizer
from elastic_kfac.training.sync.exchange import Exchange, Totals

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"model": "mlp", "arguments": {"hidden": [256, 256, 256]}, "shape": (1, 28, 28)},
    "small_cnn": {"model": "small_cnn", "arguments": {}, "shape": (1, 16, 16)},
    "vit": {
        "model": "vit",
        "arguments": {"layers": 2, "width": 64, "heads": 4, "patch": 4},
        "shape": (1, 16, 16),
    },
}
INTERVALS = ((1, 10), (5, 50))
BATCH = 120
"""Samples per step over all ranks: divisible by 1 to 5."""
FAST, SLOW = "10 Gbit/s", "1 Gbit/s"
LINKS = {FAST: NETWORK, SLOW: replace(NETWORK, slope=10 * NETWORK.slope)}


@dataclass(frozen=True)
class Case:
    """One configuration of the comparison."""

    model: str
    ranks: int
    columns: int
    intervals: tuple[int, int]

    @property
    def fraction(self) -> float:
        """Share of gradient workers."""
        return 1.0 / self.columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--cycles", type=int, default=2, help="measured inverse intervals")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    if arguments.out and arguments.out.exists():
        rows = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"]
    known = {(row["model"], row["ranks"]) for row in rows}
    for model in arguments.models:
        for ranks in arguments.ranks:
            if (model, ranks) in known:
                continue
            cases = [
                Case(model, ranks, columns, intervals)
                for columns in sorted({1, (ranks + 1) // 2, ranks})
                for intervals in INTERVALS
            ]
            for row in _compare(cases, arguments.cycles):
                rows.append(row)
                print(json.dumps(row), flush=True)
            result = {
                "benchmark": "planner_accuracy",
                "summary": _summary(rows),
                "by_model": {
                    name: _summary([row for row in rows if row["model"] == name])
                    for name in dict.fromkeys(row["model"] for row in rows)
                },
                "rows": rows,
                "samples_per_step": BATCH,
                "load": os.getloadavg()[0],
                "machine": host_kind(),
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "elastic_kfac": __version__,
                },
            }
            if arguments.out:
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"all": _summary(rows)}, indent=1))


def _config(model: str, intervals: tuple[int, int], fraction: float) -> Config:
    spec = MODELS[model]
    return parse_config(
        {
            "model": {"name": spec["model"], "arguments": spec["arguments"]},
            "train": {"global_batch_size": BATCH},
            "optimizer": {"lr": 1e-4},
            "kfac": {
                "grad_worker_frac": fraction,
                "factor_update_steps": intervals[0],
                "inverse_update_steps": intervals[1],
            },
        }
    )


def _sized(model: str, intervals: tuple[int, int], fraction: float) -> Sized:
    return Sized.of(_config(model, intervals, fraction), MODELS[model]["shape"], 10)


# -- measured ---------------------------------------------------------------------------------------


def _compare(cases: list[Case], cycles: int) -> list[dict[str, Any]]:
    """Both sides of every case, in one set of processes."""
    ranks = cases[0].ranks
    with tempfile.TemporaryDirectory() as folder:
        store, out = f"{folder}/store", f"{folder}/rows.json"
        mp.spawn(_rank, (ranks, store, out, cases, cycles), nprocs=ranks)
        rows: list[dict[str, Any]] = json.loads(Path(out).read_text(encoding="utf-8"))
    return rows


def _rank(rank: int, ranks: int, store: str, out: str, cases: list[Case], cycles: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    world = Communicator.world()
    links = with_links(measured("eigen"), world)
    profile = measure(_sized(cases[0].model, INTERVALS[0], 1.0), links)
    rows = []
    for case in cases:
        everybody = world.all_gather_object(_play(case, cycles), tag="found")
        found = {key: max(one[key] for one in everybody) for key in everybody[0]}
        rows.append(_row(case, profile, found))
    if rank == 0:
        Path(out).write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def _cpu_s() -> float:
    """CPU time of this thread and of the one that decompositions run on."""
    aside = [t.ident for t in threading.enumerate() if t.name.startswith("decomposition")]
    clocks = [time.pthread_getcpuclockid(ident) for ident in aside if ident is not None]
    return time.thread_time() + sum(map(time.clock_gettime, clocks))


def _play(case: Case, cycles: int) -> dict[str, float]:
    sized = _sized(case.model, case.intervals, case.fraction)
    world, model = Communicator.world(), sized.model
    optimizer = make_optimizer(model, sized.config.optimizer)
    kfac = KFAC(model, sized.config.kfac, lr=optimizer, process_group=world)
    share = BATCH // case.ranks

    vector = Exchange(model)

    def step() -> None:
        vector.begin_step()
        vector.begin_pass()
        sized.loss(share).backward()
        vector.end_pass(share)
        vector.reduce(world, Totals(count=share))
        vector.publish_gradients(case.ranks)
        vector.finish_step(BATCH)
        kfac.step()
        optimizer.step()

    interval = case.intervals[1]
    for _ in range(interval):
        step()  # warms up; the first one decomposes
    seconds = []
    for _ in range(cycles):
        begin = _cpu_s()
        for _ in range(interval):
            step()
        seconds.append((_cpu_s() - begin) / interval)
    with PeakBytes() as bytes_:
        for _ in range(interval):  # meets all that is held
            step()
        bytes_.peak = bytes_.now
        for _ in range(interval):
            step()
    kfac.close()
    return {"seconds": min(seconds), "bytes": float(bytes_.peak)}


# -- predicted --------------------------------------------------------------------------------------


def _row(case: Case, profile: Profile, found: dict[str, float]) -> dict[str, Any]:
    sized = _sized(case.model, case.intervals, case.fraction)
    workload = profile.workload_of(sized.config)
    share = BATCH // case.ranks
    plan = sized.plan(case.ranks, calibration=profile.calibration)

    def step(links: str) -> StepTime:
        calibration = replace(profile.calibration, network=LINKS[links])
        return predict_step(
            workload,
            calibration,
            plan,
            global_batch_size=BATCH,
            micro_batch_size=share,
        )

    exchange = {
        name: sum(
            seconds
            for phase, seconds in step(name).parts.items()
            if phase.endswith(("_reduce", "_broadcast"))
        )
        for name in LINKS
    }
    computed = step(FAST).total - exchange[FAST]
    memory = device_bytes(workload, plan, share)
    row: dict[str, Any] = {
        "model": case.model,
        "ranks": case.ranks,
        "fraction": round(case.fraction, 4),
        "intervals": list(case.intervals),
        "measured_cpu_ms": 1e3 * found["seconds"],
        "predicted_cpu_ms": 1e3 * computed,
        "exchange_ms": {name: 1e3 * seconds for name, seconds in exchange.items()},
        "measured_mib": found["bytes"] / 2**20,
        "predicted_mib": memory / 2**20,
    }
    if case.columns == 1:
        row["chosen_columns"] = {
            name: choose_plan(
                workload,
                replace(profile.calibration, network=LINKS[name]),
                case.ranks,
                global_batch_size=BATCH,
            ).num_columns
            for name in LINKS
        }
    return row


def _time(row: dict[str, Any], side: str, links: str) -> float:
    return float(row[f"{side}_cpu_ms"] + row["exchange_ms"][links])


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors of time and memory, pairs in the right order, and what the chosen fraction costs."""
    errors = [_time(row, "predicted", FAST) / _time(row, "measured", FAST) - 1 for row in rows]
    memory = [row["predicted_mib"] / row["measured_mib"] - 1 for row in rows]
    right = pairs = 0
    for one, other in itertools.combinations(rows, 2):
        same = one["model"] == other["model"]
        if (
            not same
            or abs(_time(one, "measured", FAST) / _time(other, "measured", FAST) - 1) < 0.02
        ):
            continue
        pairs += 1
        order = [
            _time(x, side, FAST) < _time(y, side, FAST)
            for side in ("measured", "predicted")
            for x, y in ((one, other),)
        ]
        right += order[0] == order[1]
    losses = []
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["ranks"], tuple(row["intervals"])), []).append(row)
    for group in groups.values():
        first = next(row for row in group if row["fraction"] == 1.0)
        for links, columns in first["chosen_columns"].items():
            tried = {round(1 / row["fraction"]): _time(row, "measured", links) for row in group}
            if columns in tried:
                losses.append(tried[columns] / min(tried.values()) - 1)
    return {
        "cases": len(rows),
        "time_within_20_percent": sum(abs(e) <= 0.2 for e in errors),
        "time_error": {
            "median": statistics.median(errors),
            "lowest": min(errors),
            "highest": max(errors),
        },
        "memory_within_5_percent": sum(abs(e) <= 0.05 for e in memory),
        "memory_error": {"lowest": min(memory), "highest": max(memory)},
        "pairs": pairs,
        "pairs_in_the_right_order": right,
        "chosen_fraction_over_best_measured": {
            "n": len(losses),
            "within_10_percent": sum(x <= 0.1 for x in losses),
            "highest": max(losses, default=0.0),
        },
    }


if __name__ == "__main__":
    main()
