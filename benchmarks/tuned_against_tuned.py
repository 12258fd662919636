"""Tuned K-FAC against tuned SGD on Fashion-MNIST: the same budget, the same target, fresh seeds.

    ELASTIC_KFAC_DATA=FOLDER python benchmarks/tuned_against_tuned.py [--name NAME] [--out FOLDER]

FOLDER holds `fashion_mnist_train.parquet` and `fashion_mnist_test.parquet`. Two searches of
`benchmarks/spaces/` run one after the other, each with the same number of trials; then every winner and
every default runs with seeds that no search has seen. Called again, it continues where it stopped.
What is compared is CPU seconds up to the target (all threads of the worker, evaluations included),
because other work on a small machine stretches its clock; stepping time by the clock and steps stand
beside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow.parquet as pq

from elastic_kfac.data.shards import make_shards
from elastic_kfac.experiments.search_runner import search
from elastic_kfac.experiments.search_space import read_space
from elastic_kfac.reports.search_page import write_search_page
from elastic_kfac.state.run_folder import RunFolder

HERE = Path(__file__).parent
SHARDS = Path("data/fashion_mnist_6k")
SAMPLES = {"train": 6000, "test": 2000}
METHODS = ("sgd", "kfac")
TITLES = {
    "sgd/default": "SGD, default",
    "sgd/best": "SGD, tuned",
    "kfac/default": "K-FAC, default",
    "kfac/best": "K-FAC, tuned",
}
COSTS = ("cpu_seconds", "train_time_to_accuracy_s", "steps")


def make_subset(data: Path) -> None:
    """The first samples of each split as shards, once."""
    if SHARDS.exists():
        return
    folder = SHARDS.with_name(f"{SHARDS.name}_parquet")
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in SAMPLES.items():
        table = pq.read_table(data / f"fashion_mnist_{split}.parquet")
        pq.write_table(table.slice(0, count), folder / f"fashion_mnist_{split}.parquet")
    make_shards(f"parquet:{folder / 'fashion_mnist'}", str(SHARDS))


def cell(folder: Path, experiment: dict[str, Any], which: str) -> dict[str, Any]:
    """The confirmation runs of a winner or a default."""
    rows = experiment["confirmation"]["rows"][which]
    runs = []
    for row in rows:
        points = [
            [round(m["train_time_s"], 3), m["step"], m["eval_accuracy"]]
            for m in RunFolder(folder / row["run_folder"]).metrics()
            if m.get("eval_accuracy") is not None
        ]
        names = ("seed", "status", "reached", *COSTS, "best_value")
        runs.append({**{n: row[n] for n in names}, "curve_train_s_step_accuracy": points})
    reached = [run for run in runs if run["reached"]]
    middle: dict[str, Any] = {"reached": f"{len(reached)}/{len(runs)}"}
    for name in COSTS:
        # The median is only known where more than half of the runs arrived.
        values = [run[name] for run in reached] + [float("inf")] * (len(runs) - len(reached))
        median = statistics.median_high(values)
        middle[name] = None if median == float("inf") else median
    parameters = {key: rows[0][key] for key in experiment["parameters"]}
    return {"parameters": parameters, "median": middle, "runs": runs}


def spent(experiment: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the search itself took, the default and the confirmation left out."""
    rows = [RunFolder(run).result() or {} for run in sorted((folder / "trials").glob("t[0-9]*"))]
    return {
        "points": experiment["space"]["num_trials"],
        "runs": len(rows),
        "steps": sum(int(row.get("steps") or 0) for row in rows),
        "worker_seconds": round(sum(float(row.get("worker_seconds") or 0) for row in rows), 1),
    }


def draw(cells: dict[str, Any], target: float, out: Path) -> None:
    """Accuracy against stepping time and against steps, every seed a line."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    colours = {"sgd": "tab:orange", "kfac": "tab:blue"}
    for name, found in cells.items():
        method, which = name.split("/")
        for number, run in enumerate(found["runs"]):
            for axis, column in zip(axes, (0, 1), strict=True):
                curve = run["curve_train_s_step_accuracy"]
                axis.plot(
                    [point[column] for point in curve],
                    [point[2] for point in curve],
                    color=colours[method],
                    linestyle="-" if which == "best" else ":",
                    linewidth=1.2,
                    label=TITLES[name] if number == 0 else None,
                )
    for axis, label in zip(axes, ("stepping time [s]", "steps"), strict=True):
        axis.axhline(target, color="grey", linewidth=0.8)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.grid(visible=True, alpha=0.3)
    axes[0].set_ylabel("test accuracy")
    axes[0].set_ylim(max(0.0, target - 0.5), None)
    axes[1].legend(loc="lower right")
    figure.suptitle(f"Fashion-MNIST, {SAMPLES['train']:,} images, until {target:.0%}; unseen seeds")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("ELASTIC_KFAC_DATA"), help="folder of Parquet"
    )
    parser.add_argument("--name", default="tuned")
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    if not SHARDS.exists():
        if arguments.data is None:
            print(
                "left out: the searches need Fashion-MNIST; set ELASTIC_KFAC_DATA or --data to a "
                "folder with fashion_mnist_train.parquet and fashion_mnist_test.parquet"
            )
            return 0
        missing = [
            s for s in SAMPLES if not (arguments.data / f"fashion_mnist_{s}.parquet").exists()
        ]
        if missing:
            print(f"no fashion_mnist_{missing[0]}.parquet in {arguments.data}", file=sys.stderr)
            return 2
        make_subset(arguments.data)
    cells: dict[str, Any] = {}
    searches: dict[str, Any] = {}
    experiment: dict[str, Any] = {}
    for method in METHODS:
        space = read_space(HERE / "spaces" / f"fashion_{method}.yaml")
        found = search(
            space,
            name=f"{arguments.name}-{method}",
            write_page=write_search_page,
            storage=arguments.storage,
        )
        if found.exit_code:
            return found.exit_code
        experiment = json.loads((found.folder / "experiment.json").read_text())
        if experiment["confirmation"] is None:
            print(f"{method}: no trial reached the end of its budget", file=sys.stderr)
            return 1
        searches[method] = spent(experiment, found.folder)
        for which in ("default", "best"):
            cells[f"{method}/{which}"] = cell(found.folder, experiment, which)
    result = {
        "what": "CPU seconds, stepping seconds and steps to the target, median over unseen seeds",
        "target_accuracy": experiment["target_accuracy"],
        "samples": SAMPLES,
        "seeds": experiment["confirmation"]["n"],
        "budget": experiment["space"]["budget"],
        "searches": searches,
        "hardware": experiment["hardware"],
        "versions": experiment["versions"],
        "cells": cells,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tuned_against_tuned.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(cells, experiment["target_accuracy"], arguments.out / "tuned_against_tuned.png")
    for name, each in cells.items():
        print(f"{TITLES[name]:15s} {each['median']}  {each['parameters']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
