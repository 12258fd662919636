"""The defaults of K-FAC against SGD and AdamW at theirs, on sets of small problems.

    python benchmarks/defaults/run.py --set judged                  # baselines and `default`, 3 seeds
    python benchmarks/defaults/run.py --set search --candidate NAME --seeds 0 --variants plain

NAME is an entry of `candidates.yaml`. Called again, it continues: only runs that the file of results
lacks, and those of other code or other problems, are made. Losses are means over the whole training
and test parts (at most 1,000 samples each) in evaluation mode, at 25 points of a run; CPU seconds are
the process time of the training loop alone, on one thread. The target of a seed is the final training
loss of the better baseline.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import runpy
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
import sklearn
import torch
import yaml
from small_problems import SETS, Images, Problem, split
from torch import Tensor, nn

import elastic_kfac
from elastic_kfac import KFAC

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import cpu_name

HERE = Path(__file__).parent
POINTS = 25
BASELINES = ("sgd", "adamw")
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
    "sgd_0.7": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.7}),
    "sgd_0.5": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5}),
    "sgd_alone": (torch.optim.SGD, {"lr": 0.1}),  # momentum is elsewhere
}
VARIANTS = {
    "plain": (1.0, 1.0),
    "lr x 10": (10.0, 1.0),
    "loss x 1000": (1.0, 1000.0),
    "loss x 0.001": (1.0, 0.001),
}
"""Factors on the learning rate and on the loss that is differentiated."""


def train(problem: Problem, seed: int, candidate: dict[str, Any], variant: str) -> dict[str, Any]:
    """One run. The seed fixes the initial weights and the batches, whatever the optimizer is."""
    train_part, test_part = split(problem)
    (x, y), lr_factor, loss_factor = train_part, *VARIANTS[variant]
    torch.manual_seed(seed)
    model = problem.model()
    kind, settings = OPTIMIZERS[candidate.get("optimizer", "sgd")]
    settings = {**settings, "lr": settings["lr"] * lr_factor}
    optimizer = kind(model.parameters(), **settings)
    schedule = None
    if problem.cosine:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, problem.steps)
    preconditioner = _preconditioner(candidate, model, optimizer, problem)
    order = torch.Generator().manual_seed(seed)
    batches: Iterator[Tensor] = iter(())
    count = POINTS if variant == "plain" else 1
    marks = {round((i + 1) * problem.steps / count) for i in range(count)}
    points = [_point(problem, model, 0, 0.0, train_part, test_part)]
    seconds = 0.0
    for step in range(1, problem.steps + 1):
        batch = next(batches, None)
        if batch is None or len(batch) < problem.batch:
            batches = iter(torch.randperm(len(x), generator=order).split(problem.batch))
            batch = next(batches)
        inputs, targets = x[batch], y[batch]
        start = time.process_time()
        optimizer.zero_grad()
        loss = problem.loss(model(inputs), targets) * loss_factor
        loss.backward()
        follows = getattr(preconditioner, "reduction_due", lambda: False)()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()
        if follows:  # Levenberg–Marquardt
            with torch.no_grad():
                after = problem.loss(model(inputs), targets) * loss_factor
            preconditioner.adapt_damping(float(after - loss.detach()))
        seconds += time.process_time() - start
        if schedule:
            schedule.step()
        if step in marks:
            points.append(_point(problem, model, step, seconds, train_part, test_part))
            if not math.isfinite(points[-1]["train"]):
                break
    curve = {name: [point[name] for point in points] for name in points[0]}
    return {"steps": step, "cpu_s": round(seconds, 3), "curve": curve}


def _preconditioner(
    candidate: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, problem: Problem
) -> Any:
    if candidate.get("kfac") is None:
        return None
    options: dict[str, Any] = {"loss_reduction": "positions"} if problem.positions else {}
    options |= candidate["kfac"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # uncovered layers are on purpose
        if "build" in candidate:
            file, function = candidate["build"].split(":")
            return _module(str(HERE / file))[function](model, optimizer, **options)
        return KFAC(model, lr=optimizer, **options)


def _module(file: str, loaded: dict[str, dict[str, Any]] = {}) -> dict[str, Any]:  # noqa: B006
    if file not in loaded:
        loaded[file] = runpy.run_path(file)
    return loaded[file]


@torch.no_grad()
def _point(
    problem: Problem, model: nn.Module, step: int, seconds: float, *parts: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    point: dict[str, Any] = {"step": step, "cpu_s": round(seconds, 3)}
    model.eval()
    for name, (x, y) in zip(("train", "test"), parts, strict=True):
        output = model(x[:1000])
        point[name] = float(f"{problem.loss(output, y[:1000]).item():.4g}")
    if problem.accuracies:
        point["accuracy"] = round((output.argmax(1) == y[:1000]).double().mean().item(), 4)
    model.train()
    return point


# -- the file of results --------------------------------------------------------------------------


def code(*rooms: str) -> str:
    """A hash of the problems and of the rooms of the package that a run depends on."""
    root = Path(elastic_kfac.__file__).parent
    digest = hashlib.sha256((HERE / "small_problems.py").read_bytes())
    for room in rooms:
        for path in sorted((root / room).rglob("*.py")) or [root / room]:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def open_results(path: Path) -> dict[str, Any]:
    if path.exists():
        return json.loads(path.read_text())
    return {
        "benchmark": "defaults",
        "what": "losses over small problems, CPU seconds of the training loop; see run.py",
        "hardware": {"cpu": cpu_name(), "threads": 1},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "sklearn": sklearn.__version__,
            "elastic_kfac": elastic_kfac.__version__,
        },
        "baselines": {name: OPTIMIZERS[name][1] for name in BASELINES},
        "methods": {},
        "summary": {},
        "runs": {},
    }


def save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part, results = path.with_suffix(".part"), _finite(results)
    runs = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in results["runs"].items())
    head = json.dumps({k: v for k, v in results.items() if k != "runs"}, indent=1)
    part.write_text(head.removesuffix("\n}") + f',\n "runs": {{\n{runs}\n }}\n}}\n')
    part.replace(path)


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [*map(_finite, value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- the table ------------------------------------------------------------------------------------


def judge(
    results: dict[str, Any], name: str, problems: Iterable[Problem], seeds: list[int]
) -> list[dict[str, Any]]:
    """What each problem gave, where all seeds of the baselines and of the candidate are there."""
    rows = []
    for problem in problems:

        def found(method: str, variant: str = "plain", name: str = problem.name) -> list[Any]:
            keys = [f"{name} | {variant} | {seed} | {method}" for seed in seeds]
            return [results["runs"][key] for key in keys if key in results["runs"]]

        runs = {method: found(method) for method in (*BASELINES, name)}
        if min(map(len, runs.values())) < len(seeds):
            continue
        losses = {
            part: {method: _mean(run["curve"][part][-1] for run in runs[method]) for method in runs}
            for part in ("train", "test")
        }
        baseline = min(BASELINES, key=losses["train"].__getitem__)
        both = runs[baseline], runs[name]
        targets = [_number(run["curve"]["train"][-1]) for run in runs[baseline]]
        variants = {variant: found(name, variant) for variant in VARIANTS}
        rows.append(
            {
                "problem": problem.name,
                "baseline": baseline,
                "train": [losses["train"][baseline], losses["train"][name]],
                "test": [min(losses["test"][each] for each in BASELINES), losses["test"][name]],
                **{
                    column: [
                        _mean(map(_first, each, targets, [column] * len(each))) for each in both
                    ]
                    for column in ("step", "cpu_s")
                },
                "cpu_per_step": [
                    _mean(run["cpu_s"] / run["steps"] for run in each) for each in both
                ],
                "above": {v: sum(map(_is_above, each)) for v, each in variants.items() if each},
                "runs": sum(map(len, variants.values())),
                **({"accuracy": _accuracies(problem, runs[name])} if problem.accuracies else {}),
            }
        )
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares over the problems, and runs that ended above their start."""

    def share(column: str, factor: float = 1.0) -> str:
        return f"{sum(r[column][1] <= factor * r[column][0] for r in rows)} of {len(rows)}"

    above = {v: sum(row["above"].get(v, 0) for row in rows) for v in VARIANTS}
    return {
        "train_better": f"{sum(r['train'][1] < r['train'][0] for r in rows)} of {len(rows)}",
        "test_within_2_percent": share("test", 1.02),
        "fewer_steps_to_target": share("step"),
        "less_cpu_to_target": f"{sum(r['cpu_s'][1] < r['cpu_s'][0] for r in rows)} of {len(rows)}",
        "ended_above_start": f"{sum(above.values())} of {sum(row['runs'] for row in rows)}",
        "above_by_variant": above,
        "cpu_per_step_over_baseline": round(
            statistics.median(r["cpu_per_step"][1] / r["cpu_per_step"][0] for r in rows), 2
        ),
    }


def _number(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.inf


def _mean(values: Iterable[float | None]) -> float:
    numbers = [*map(_number, values)]
    return float(f"{sum(numbers) / len(numbers):.4g}")


def _first(run: dict[str, Any], target: float, column: str) -> float:
    curve = run["curve"]
    points = zip(curve[column], curve["train"], strict=True)
    return next((cost for cost, loss in points if _number(loss) <= target), math.inf)


def _is_above(run: dict[str, Any]) -> bool:
    losses = run["curve"]["train"]
    return _number(losses[-1]) > losses[0]


def _accuracies(problem: Problem, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The first steps with each accuracy, by seed, and the best accuracies."""

    def step(run: dict[str, Any], level: float) -> int | None:
        points = zip(run["curve"]["step"], run["curve"]["accuracy"], strict=True)
        return next((step for step, accuracy in points if accuracy >= level), None)

    found: dict[str, Any] = {f"{a:.0%}": [step(run, a) for run in runs] for a in problem.accuracies}
    return found | {"best": [max(run["curve"]["accuracy"]) for run in runs]}


def show(rows: list[dict[str, Any]], summary: dict[str, Any], title: str) -> str:
    """A Markdown table: baseline → candidate."""
    lines = [
        f"## {title}",
        "| problem | baseline | training loss | test loss | steps | CPU s to target | above start |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:

        def both(column: str, row: dict[str, Any] = row) -> str:
            old, new = (f"{v:.3g}" if math.isfinite(v) else "–" for v in row[column])
            won = row[column][1] <= row[column][0] * (1.02 if column == "test" else 1)
            return f"{old} → **{new}**" if won else f"{old} → {new}"

        cells = [both(column) for column in ("train", "test", "step", "cpu_s")]
        above = (
            ", ".join(f"{v}: {n}" for v, n in row["above"].items() if n) or f"0 of {row['runs']}"
        )
        lines.append(f"| {row['problem']} | {row['baseline']} | {' | '.join(cells)} | {above} |")
        if "accuracy" in row:
            lines.append(f"|  first step with {row['accuracy']} | | | | | | |")
    return "\n".join([*lines, "", *(f"- {k}: {v}" for k, v in summary.items())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", default="judged", choices=SETS, dest="which")
    parser.add_argument("--candidate", nargs="*", default=["default"], metavar="NAME")
    parser.add_argument("--candidates", type=Path, default=HERE / "candidates.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--problems", nargs="+", help="only those whose name contains one of these")
    parser.add_argument("--data", type=Path, help="folder of Parquet files, for the set `images`")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "defaults.json")
    parser.add_argument("--again", action="store_true", help="repeat the runs of these candidates")
    arguments = parser.parse_args()
    known = yaml.safe_load(arguments.candidates.read_text())
    for name in arguments.candidate:
        if name not in known:
            print(f"no candidate {name}; allowed: {', '.join(known)}", file=sys.stderr)
            return 2
    torch.set_num_threads(1)
    Images.folder = arguments.data
    methods: dict[str, dict[str, Any]] = {name: {"optimizer": name} for name in BASELINES}
    for name in arguments.candidate:
        entry = known[name] or {}
        methods[name] = {**entry, "kfac": entry.get("kfac", {})}
    problems = [
        p
        for p in SETS[arguments.which]
        if not arguments.problems or any(part in p.name for part in arguments.problems)
    ]
    if not problems:
        names = ", ".join(p.name for p in SETS[arguments.which])
        print(f"no such problem in {arguments.which}; allowed: {names}", file=sys.stderr)
        return 2
    results = open_results(arguments.out)
    for name, method in methods.items():
        rooms = () if name in BASELINES else ("curvature", "kfac", "config/kfac.py")
        mine = {"settings": method, "code": code(*rooms)}
        again = arguments.again and name in arguments.candidate
        if again or results["methods"].get(name, mine) != mine:
            kept = {k: v for k, v in results["runs"].items() if not k.endswith(f"| {name}")}
            results["runs"] = kept
        results["methods"][name] = mine
    for problem in problems:
        for seed in arguments.seeds:
            for name, method in methods.items():
                for variant in ["plain"] if name in BASELINES else arguments.variants:
                    key = f"{problem.name} | {variant} | {seed} | {name}"
                    if key in results["runs"]:
                        continue
                    run = results["runs"][key] = train(problem, seed, method, variant)
                    losses, test = run["curve"]["train"], run["curve"]["test"]
                    print(
                        f"{key:60s} train {losses[0]:.4g} -> {losses[-1]:.4g}  "
                        f"test {test[-1]:.4g}  {run['cpu_s']:.2f} CPU s",
                        file=sys.stderr,
                        flush=True,
                    )
                    save(arguments.out, results)
    for name in arguments.candidate:
        rows = judge(results, name, problems, arguments.seeds)
        if not rows:
            continue
        title = f"{name}, {arguments.which}, {len(arguments.seeds)} seeds"
        summary = summarise(rows)
        results["summary"][title] = {**summary, "problems": rows}
        print(show(rows, summary, title))
    save(arguments.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
