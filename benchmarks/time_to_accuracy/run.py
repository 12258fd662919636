"""Time to a validation target: K-FAC against tuned SGD, AdamW, Muon, SOAP, Shampoo and kfac-pytorch.

    python benchmarks/time_to_accuracy/run.py --data FOLDER [--jobs 2]

AlgoPerf's protocol for external tuning (Dahl et al. 2023), scaled down: every method gets 5 points of its
declared space, drawn anew for each of 3 studies; the target of a workload is what the better one of SGD
and AdamW ends at with their whole budget of steps, on a validation split; a study counts its fastest
point, a workload the median of its studies, a miss is infinite; the score is the performance profile
integrated to τ = 4. Steps, and CPU seconds of the training loop alone, on one thread per run: when a
workload is complete, the fastest points of all methods are repeated in turns; their seconds per step
count.

FOLDER holds Parquet files of Fashion-MNIST and CIFAR-10; without it two workloads are left out. SOAP,
Shampoo and kfac-pytorch are fetched from their repositories at a stated commit into `--peers`.
Called again, it continues, also with more points, studies or workloads: only what is missing is run, and
what stopped at a target that has moved. With two jobs it takes about 100 minutes on two cores, and seven
for each point of a study.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import torch
from contests import WORKLOADS, Images, Problem, ce, split
from methods import METHODS, PEERS, Method, Peers, rate_at
from page import write_report
from protocol import (
    advantage,
    fastest,
    is_timed,
    profile,
    profile_score,
    reached,
    score,
    table,
    target,
)
from torch import Tensor, nn

import elastic_kfac
from elastic_kfac.errors import NumericalError

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import cpu_name

HERE = Path(__file__).parent
POINTS = 40
"""Evaluations of a run."""
VALIDATED, POSITIONS = 1000, 10_000
"""Largest validation part, samples and predicted positions."""
OURS = ("ours, default", "ours, tuned")
Key = tuple[str, str, int, int]
"""Workload, method, study, point."""


def train(
    problem: Problem, method: Method, setting: dict[str, float], seed: int, steps: int, goal: float
) -> list[list[float | None]]:
    """(step, CPU seconds, validation metric), until the target, the budget or divergence."""
    (x, y), validation = split(problem)
    count = min(VALIDATED, POSITIONS // y.shape[1]) if problem.positions else VALIDATED
    validation = validation[0][:count], validation[1][:count]
    torch.manual_seed(seed)
    model = problem.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that a preconditioner leaves out
        optimizers, preconditioner = method.build(model, setting)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    marks = {math.ceil((i + 1) * steps / POINTS) for i in range(POINTS)}
    batches = _batches(len(x), problem.batch, seed)
    curve: list[list[float | None]] = []
    seconds = 0.0
    for step, batch in enumerate(itertools.islice(batches, steps), 1):
        inputs, targets = x[batch], y[batch]
        start = time.process_time()
        factor = rate_at((step - 0.5) / steps, setting.get("warmup", 0.05))
        for optimizer, base in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad()
        problem.loss(model(inputs), targets).backward()
        try:
            for each in (preconditioner, *optimizers):
                if each is not None:
                    each.step()
        except (
            RuntimeError,
            ArithmeticError,
            NumericalError,
        ) as error:
            # The run has diverged: something cannot be decomposed.
            print(f"{problem.name}, step {step}: {error}", file=sys.stderr, flush=True)
            curve.append([step, round(seconds, 3), None])
            break
        seconds += time.process_time() - start
        if step in marks:
            metric = _metric(problem, model, *validation)
            curve.append([step, round(seconds, 3), metric])
            if metric is None or metric <= goal:
                break
    return curve


def _batches(samples: int, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for batch in torch.randperm(samples, generator=generator).split(size):
            if len(batch) == size:
                yield batch


@torch.no_grad()
def _metric(problem: Problem, model: nn.Module, x: Tensor, y: Tensor) -> float | None:
    """The error rate of classifiers, the loss of the others; lower is better."""
    model.eval()
    output = model(x)
    value = (
        (output.argmax(1) != y).double().mean() if problem.loss is ce else problem.loss(output, y)
    )
    model.train()
    return float(f"{value.item():.5g}") if math.isfinite(value.item()) else None


def budget(workload: str, scale: float) -> int:
    """Steps that a run may take."""
    problem = next(p for p in WORKLOADS if p.name == workload)
    return max(2, round(problem.steps * scale))


@cache
def _warm(method: str) -> None:
    """A few steps on a small model: what a method loads or compiles at first use is no part of a run."""

    def data() -> tuple[Tensor, Tensor]:
        return torch.randn(64, 8), torch.arange(64) % 3

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        )

    small = Problem("warm-up", data, model, ce, 16, 12)
    train(small, METHODS[method], METHODS[method].points(1, 0)[0], 0, small.steps, -math.inf)


def one(key: Key, setting: dict[str, float], scale: float, goal: float) -> dict[str, Any]:
    """A run, in a process of its own pool."""
    workload, method, study, point = key
    problem = next(p for p in WORKLOADS if p.name == workload)
    steps = budget(workload, scale)
    _warm(method)
    curve = train(problem, METHODS[method], setting, 1000 * study + point, steps, goal)
    names = ("workload", "method", "study", "point")
    return dict(zip(names, key, strict=True)) | {"setting": setting, "curve": curve}


def _prepare(data: Path | None, peers: Path) -> None:
    torch.set_num_threads(1)
    Images.folder, Peers.folder = data, peers


def plan(workload: str, methods: list[str], arguments: argparse.Namespace) -> Iterator[Any]:
    """The runs of a workload, methods taking turns, so that a busy machine hits them alike."""
    for study in range(arguments.studies):
        points = {m: METHODS[m].points(arguments.points, study) for m in methods}
        for point in range(arguments.points):
            for method in methods:
                if point < len(points[method]):
                    yield (workload, method, study, point), points[method][point]


class Results:
    """The file of results, written as a whole after every run."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "benchmark": "time_to_accuracy",
            "what": "steps and CPU seconds to a validation target; see run.py",
            "settings": settings,
            "spaces": {
                name: {k: [r.low, r.high] for k, r in method.space.items()}
                for name, method in METHODS.items()
            },
            "peers": {peer.url: peer.commit for peer in PEERS.values()},
            "hardware": {"cpu": cpu_name(), "threads_per_run": 1},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "elastic_kfac": elastic_kfac.__version__,
            },
            "targets": {},
            "summary": {},
            "runs": [],
        }
        if path.exists():
            found = json.loads(path.read_text())
            if found["settings"]["scale"] != settings["scale"]:
                raise SystemExit(
                    f"{path} was made with {found['settings']}, not {settings}; choose another --out"
                )
            self.content |= {k: found[k] for k in ("targets", "hardware", "versions", "runs")}

    def has(self, key: Key, setting: dict[str, float], steps: int, goal: float) -> bool:
        """Whether a run is there; drops one of other settings, from a space that has changed, and one
        that stopped at a target which more points have moved since."""
        names = ("workload", "method", "study", "point")
        for run in self.content["runs"]:
            if tuple(run[name] for name in names) == key:
                last, _, metric = run["curve"][-1]
                whole = last >= steps or metric is None or metric <= goal
                if run["setting"] == setting and whole:
                    return True
                self.content["runs"].remove(run)
                return False
        return False

    def save(self) -> None:
        head = json.dumps({k: v for k, v in self.content.items() if k != "runs"}, indent=1)
        runs = ",\n".join(f"  {json.dumps(run)}" for run in self.content["runs"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(head.removesuffix("\n}") + f',\n "runs": [\n{runs}\n ]\n}}\n')
        part.replace(self.path)


def summarise(content: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """Scores, advantages and goals over the workloads that every method has finished."""
    runs, goals = content["runs"], content["targets"]
    complete = [
        w
        for w in goals
        if all(any(r["workload"] == w and r["method"] == m for r in runs) for m in methods)
    ]
    if not complete:
        return {}
    of = table(runs, complete, methods, goals)
    others = [m for m in methods if m not in OURS]
    summary: dict[str, Any] = {}
    for column, name in enumerate(("steps", "cpu_s")):
        times = of(column)
        ratios = profile(times)
        summary[name] = {
            "median_to_target": {
                w: {m: _plain(v) for m, v in row.items()} for w, row in times.items()
            },
            "range_to_target": {
                w: {
                    m: [_plain(f(score(runs, w, m, goals[w], column))) for f in (min, max)]
                    for m in methods
                }
                for w in complete
            },
            "ratios": {m: [_plain(r) for r in each] for m, each in ratios.items()},
            "profile_score": {m: round(profile_score(each), 3) for m, each in ratios.items()},
            "advantage_over_best_other": {
                m: _plain(advantage(times, m, others)) for m in methods if m in OURS
            },
        }
    known = {p.name: p.batch for p in WORKLOADS}
    summary["claims"] = _claims(summary, known) if {*OURS} & {*methods} else {}
    summary["cpu_ms_per_step"] = {
        w: {m: _per_step(runs, w, m, goals[w]) for m in methods} for w in complete
    }
    summary["points_that_reached"] = {
        w: {
            m: f"{sum(math.isfinite(reached(r, goals[w])[0]) for r in each)} of {len(each)}"
            for m in methods
            for each in [[r for r in runs if r["workload"] == w and r["method"] == m]]
        }
        for w in complete
    }
    return summary


def _claims(summary: dict[str, Any], batches: dict[str, int]) -> dict[str, Any]:
    """What K-FAC is meant to reach here, each with the number that decides it."""
    steps, cpu = (summary[name] for name in ("steps", "cpu_s"))
    medians = cpu["median_to_target"]

    def ours(row: dict[str, float | None]) -> float:
        return min(_number(row.get(m)) for m in OURS)

    best = {n: max(e["profile_score"], key=e["profile_score"].get) for n, e in summary.items()}
    claims: dict[str, Any] = {
        f"highest profile score by {words}": (best[name] in OURS, best[name])
        for name, words in (("steps", "steps"), ("cpu_s", "CPU time"))
    }
    for name, each, least in (("steps", steps, 1.3), ("CPU time", cpu, 1.15)):
        value = max(_number(v, 0.0) for v in each["advantage_over_best_other"].values())
        claims[f"{least} times better than the best other method by {name}"] = value >= least, value
    if "SGD" in next(iter(medians.values())):
        saved = {
            w: round(1 - ours(row) / _number(row["SGD"]), 3)
            for w, row in medians.items()
            if batches[w] >= 1024 and math.isfinite(ours(row))
        }
        enough = sum(value >= 0.4 for value in saved.values()) >= 2
        claims["40 % less CPU time than SGD at batch >= 1024, twice"] = enough, saved
    if "kfac-pytorch" in next(iter(medians.values())):
        behind = [
            f"{w}, {name}"
            for name, each in (("steps", steps), ("CPU time", cpu))
            for w, row in each["median_to_target"].items()
            if ours(row) > _number(row["kfac-pytorch"])
        ]
        claims["never behind kfac-pytorch"] = not behind, behind
    return {name: {"holds": holds, "value": value} for name, (holds, value) in claims.items()}


def _number(value: float | None, missing: float = math.inf) -> float:
    return missing if value is None else value


def _per_step(runs: list[dict[str, Any]], workload: str, method: str, goal: float) -> float | None:
    """Of the runs that were repeated; None where there are none."""
    found = [
        1e3 * reached(run, goal)[1] / reached(run, goal)[0]
        for run in runs
        if run["workload"] == workload and run["method"] == method and is_timed(run, goal)
    ]
    return round(statistics.median(found), 2) if found else None


def _plain(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of Parquet files")
    parser.add_argument("--peers", type=Path, default=Peers.folder, help="cache of repositories")
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "results" / "time_to_accuracy.json"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument(
        "--workloads", nargs="+", help="only those whose name contains one of these"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--points", type=int, default=5)
    parser.add_argument("--studies", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every budget of steps")
    arguments = parser.parse_args()
    workloads = [
        p.name
        for p in WORKLOADS
        if (arguments.data or not p.name.startswith(("fashion", "cifar")))
        and (not arguments.workloads or any(part in p.name for part in arguments.workloads))
    ]
    if not workloads:
        print(f"no such workload; allowed: {', '.join(p.name for p in WORKLOADS)}", file=sys.stderr)
        return 2
    if arguments.data is None:
        print("left out: the workloads on Fashion-MNIST and CIFAR-10 need --data", file=sys.stderr)
    Peers.folder = arguments.peers
    methods = []
    for name in arguments.methods:
        reason = Peers.fetch(METHODS[name].peer) if METHODS[name].peer else ""
        if reason:
            print(f"left out: {name} ({reason})", file=sys.stderr)
        else:
            methods.append(name)
    first = [m for m in methods if METHODS[m].sets_target]
    if not first:
        print("SGD or AdamW must be among --methods: they set the targets", file=sys.stderr)
        return 2
    settings = {name: getattr(arguments, name) for name in ("points", "studies", "scale")}
    results = Results(arguments.out, settings)
    runs, targets = results.content["runs"], results.content["targets"]
    with ProcessPoolExecutor(
        arguments.jobs,
        multiprocessing.get_context("spawn"),
        initializer=_prepare,
        initargs=(arguments.data, arguments.peers),
    ) as pool:
        for workload in workloads:
            for group, is_first in ((first, True), ([m for m in methods if m not in first], False)):
                if not is_first:
                    targets[workload] = target(runs, workload, first)
                goal = -math.inf if is_first else targets[workload]
                steps = budget(workload, arguments.scale)
                futures = [
                    pool.submit(one, key, setting, arguments.scale, goal)
                    for key, setting in plan(workload, group, arguments)
                    if not results.has(key, setting, steps, goal)
                ]
                for future in as_completed(futures):
                    runs.append(future.result())
                    results.save()
                    print(_line(runs[-1], targets.get(workload)), file=sys.stderr, flush=True)
            _time_again(pool, results, workload, arguments.scale)
            results.content["summary"] = summarise(results.content, methods)
            results.save()
            write_report(arguments.out.with_suffix(".html"), results.content)
    for claim, found in results.content["summary"]["claims"].items():
        print(f"{'holds' if found['holds'] else 'fails'}: {claim} ({found['value']})")
    for name in ("steps", "cpu_s"):
        print(f"profile score by {name}: {results.content['summary'][name]['profile_score']}")
    return 0


def _time_again(pool: ProcessPoolExecutor, results: Results, workload: str, scale: float) -> None:
    """Repeats the fastest points of a workload, all of them if any is new: a machine's speed changes."""
    goal = results.content["targets"][workload]
    runs = fastest(results.content["runs"], workload, goal)
    if all(is_timed(run, goal) for run in runs):
        return
    names = ("workload", "method", "study", "point")
    futures = [
        pool.submit(one, tuple(run[n] for n in names), run["setting"], scale, goal) for run in runs
    ]
    for run, future in zip(runs, futures, strict=True):
        # On another machine a trajectory may differ in its last digits, and then in its steps.
        step, seconds, _ = future.result()["curve"][-1]
        taken = reached(run, goal)[0] * seconds / step
        run["again"] = {"target": goal, "cpu_s": round(taken, 3)}
    results.save()


def _line(run: dict[str, Any], goal: float | None) -> str:
    step, seconds, metric = run["curve"][-1]
    name = f"{run['workload']} | {run['method']} | study {run['study']} point {run['point']}"
    found = "" if goal is None else f", target {goal:.4g}"
    return f"{name:66s} {metric} after {step} steps, {seconds} CPU s{found}"


if __name__ == "__main__":
    sys.exit(main())
