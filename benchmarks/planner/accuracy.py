"""Is the planner right? Predicted against measured steps and memory at 1 to 5 processes.

    python benchmarks/planner/accuracy.py [--out FILE] [--models NAME ...] [--ranks N ...]

Every case is a model, a number of gloo processes, a fraction of gradient workers and intervals. Measured
is the CPU time of the threads that train and decompose (waiting for a peer takes none), per step and
rank; that of the slowest rank is the computation on the critical path: two cores cannot run five ranks
side by side. To both sides the same links are added (10 Gbit/s, 50 µs): bytes and rounds by the traffic
model, whose bytes tests compare with counted ones. Predicted follows from a profile that each rank takes
alone, as `elastic-kfac plan` does, the host's time per collective as ranks measure it when they start,
and shapes. All ranks take theirs at the same time, so that both sides share caches with as many others.
Profile and cases take turns, since a shared machine's speed varies by the minute: a round takes a
profile, then an inverse interval of every case (20 steps at least). Measured is the median of the rounds,
of the rank where that is largest, predicted the median of the rounds and ranks. Memory is the most bytes
that tensors of a rank held at once. Each profile of each rank chooses a fraction of its own.

With `--out`, what an earlier call has measured stays.
"""

from __future__ import annotations

import argparse
import contextlib
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
from elastic_kfac.placement.simulator import device_bytes, predict_step
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
    parser.add_argument("--rounds", type=int, default=3, help="turns of profile and cases")
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
            for row in _compare(cases, arguments.rounds):
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


def _compare(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    """Both sides of every case, in one set of processes."""
    ranks = cases[0].ranks
    with tempfile.TemporaryDirectory() as folder:
        store, out = f"{folder}/store", f"{folder}/rows.json"
        mp.spawn(_rank, (ranks, store, out, cases, rounds), nprocs=ranks)
        rows: list[dict[str, Any]] = json.loads(Path(out).read_text(encoding="utf-8"))
    return rows


def _rank(rank: int, ranks: int, store: str, out: str, cases: list[Case], rounds: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    world = Communicator.world()
    links = with_links(measured("eigen"), world)
    playing = [_Playing(case) for case in cases]
    profiles: list[Profile] = []
    for number in range(rounds):
        profiles.append(measure(_sized(cases[0].model, INTERVALS[0], 1.0), links))
        first = number % len(playing)
        for one in playing[first:] + playing[:first]:
            one.play()
    rows = []
    for one in playing:
        own = {
            "seconds": statistics.median(one.seconds),
            "bytes": one.peak_bytes(),
            "predicted": [_predicted(one.case, profile) for profile in profiles],
        }
        rows.append(_row(one.case, world.all_gather_object(own, tag="found")))
    if rank == 0:
        Path(out).write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def _clocks() -> dict[int, float]:
    """CPU time of this thread and of those that decompositions run on, by thread."""
    found = {0: time.thread_time()}
    for thread in threading.enumerate():
        if thread.name.startswith("decomposition") and thread.ident is not None:
            with contextlib.suppress(OSError):  # it has just ended
                clock = time.pthread_getcpuclockid(thread.ident)
                found[thread.ident] = time.clock_gettime(clock)
    return found


class _Playing:
    """One case's training on this rank."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.seconds: list[float] = []
        """CPU seconds of a step, by round."""
        sized = _sized(case.model, case.intervals, case.fraction)
        self._sized, self._share = sized, BATCH // case.ranks
        self._world = Communicator.world()
        self._optimizer = make_optimizer(sized.model, sized.config.optimizer)
        self._kfac = KFAC(
            sized.model, sized.config.kfac, lr=self._optimizer, process_group=self._world
        )
        self._vector = Exchange(sized.model)
        self._steps()  # warms up; the first one decomposes

    def _steps(self) -> None:
        """An inverse interval."""
        vector, share = self._vector, self._share
        for _ in range(self.case.intervals[1]):
            vector.begin_step()
            vector.begin_pass()
            self._sized.loss(share).backward()
            vector.end_pass(share)
            vector.reduce(self._world, Totals(count=share))
            vector.publish_gradients(self.case.ranks)
            vector.finish_step(BATCH)
            self._kfac.step()
            self._optimizer.step()

    def play(self) -> None:
        """One round: at least 20 steps."""
        begin, intervals = _clocks(), max(1, 20 // self.case.intervals[1])
        for _ in range(intervals):
            self._steps()
        seconds = sum(now - begin.get(thread, 0.0) for thread, now in _clocks().items())
        self.seconds.append(seconds / (intervals * self.case.intervals[1]))

    def peak_bytes(self) -> float:
        """The most that was held in an interval. Ends the training."""
        with PeakBytes() as bytes_:
            self._steps()  # meets all that is held
            bytes_.peak = bytes_.now
            self._steps()
        self._kfac.close()
        return float(bytes_.peak)


# -- predicted --------------------------------------------------------------------------------------


def _predicted(case: Case, profile: Profile) -> dict[str, Any]:
    """By one rank's profile of one round."""
    sized = _sized(case.model, case.intervals, case.fraction)
    workload = profile.workload_of(sized.config)
    plan = sized.plan(case.ranks, calibration=profile.calibration)
    computed, exchange, chosen = 0.0, {}, {}
    for name, line in LINKS.items():
        calibration = replace(profile.calibration, network=line)
        step = predict_step(
            workload,
            calibration,
            plan,
            global_batch_size=BATCH,
            micro_batch_size=BATCH // case.ranks,
        )
        exchange[name] = sum(
            seconds
            for phase, seconds in step.parts.items()
            if phase.endswith(("_reduce", "_broadcast"))
        )
        computed = step.total - exchange[name]
        if case.columns == 1:
            choice = choose_plan(workload, calibration, case.ranks, global_batch_size=BATCH)
            chosen[name] = choice.num_columns
    return {
        "computed": computed,
        "exchange": exchange,
        "bytes": device_bytes(workload, plan, BATCH // case.ranks),
        "chosen": chosen,
    }


def _row(case: Case, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    predicted = [one for rank in ranks for one in rank["predicted"]]
    row: dict[str, Any] = {
        "model": case.model,
        "ranks": case.ranks,
        "fraction": round(case.fraction, 4),
        "intervals": list(case.intervals),
        "rounds": len(ranks[0]["predicted"]),
        "measured_cpu_ms": 1e3 * max(rank["seconds"] for rank in ranks),
        "predicted_cpu_ms": 1e3 * statistics.median(one["computed"] for one in predicted),
        "exchange_ms": {
            name: 1e3 * statistics.median(one["exchange"][name] for one in predicted)
            for name in LINKS
        },
        "measured_mib": max(rank["bytes"] for rank in ranks) / 2**20,
        "predicted_mib": statistics.median(one["bytes"] for one in predicted) / 2**20,
    }
    if case.columns == 1:
        row["chosen_columns"] = {name: [one["chosen"][name] for one in predicted] for name in LINKS}
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
        for links, chosen in first["chosen_columns"].items():
            tried = {round(1 / row["fraction"]): _time(row, "measured", links) for row in group}
            best = min(tried.values())
            losses += [tried[columns] / best - 1 for columns in chosen if columns in tried]
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
