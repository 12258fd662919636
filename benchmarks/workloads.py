"""Every kind of task in small: K-FAC as it comes against tuned SGD, AdamW and LAMB.

    python benchmarks/workloads.py [--tasks char_gpt ...] [--seeds 3] [--out FILE]

The tasks are those of `jobs/configs/`, with their cosine rate, batch and length. SGD, AdamW and LAMB each
get one run per rate of a grid of the same size, on a part of the training data and judged by another part
(whole modules of text, other digits, other patients), with a seed that is not used again; the best rate
is the one with the best metric at the end. K-FAC (over SGD) is not tuned: it keeps the configuration of
the job. The target is the configuration's. Then every method trains on the whole training split with
further seeds and is judged by the test split: epochs up to the first evaluation at the target.

Called again, it continues where it stopped. CPU seconds are those of the process, one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from elastic_kfac import __version__
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config, read_config
from elastic_kfac.data.dataset import open_datasets
from elastic_kfac.data.shards import make_shards
from elastic_kfac.data.sources import Source, embedded, open_source
from elastic_kfac.data.sources.generated import digit_images
from elastic_kfac.errors import NumericalError
from elastic_kfac.training.rank import RankTrainer

sys.path.insert(0, str(Path(__file__).parent))
from machine import cpu_name

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "jobs" / "configs"
EVALUATIONS = {
    "regression": 1.0,
    "unet_scenes": 0.5,
    "detector_scenes": 1.0,
    "char_gpt": 0.25,
    "masked_lm": 0.5,
}
"""Tasks, and the epochs between evaluations."""
GRIDS: Mapping[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "sgd": ({"optimizer.name": "sgd"}, (0.03, 0.1, 0.3, 1.0)),
    "adamw": (
        {"optimizer.name": "adamw", "optimizer.weight_decay": 0.01},
        (1e-3, 3e-3, 1e-2, 3e-2),
    ),
    "lamb": ({"optimizer.name": "lamb", "optimizer.weight_decay": 0.01}, (3e-3, 1e-2, 3e-2, 0.1)),
}
"""What is tuned: settings and rates. Momentum, and β1 of the others, is 0.9."""
METHODS = ("kfac", *GRIDS)
TUNING_SEED = 100
HELD_OUT = 5
"""The reciprocal of the part of the training data that judges while rates are chosen."""


@contextmanager
def held_out(name: str) -> Iterator[Any]:
    """Makes shards of the training data alone: `train` without a part, and that part as `test`."""
    modules = embedded.MODULES["train"]
    pictures, labels = digit_images("train")
    cut = len(labels) - len(labels) // HELD_OUT
    parts = {"train": slice(None, cut), "test": slice(cut, None)}
    found = open_source(name)

    def digits(split: str) -> tuple[Any, Any]:
        return pictures[parts[split]], labels[parts[split]]

    def split(which: str) -> Any:
        whole = found.split("train")
        cut = whole.num_samples - whole.num_samples // HELD_OUT  # type: ignore[attr-defined]
        return replace(whole, order=whole.order[:cut] if which == "train" else whole.order[cut:])  # type: ignore[call-arg, attr-defined]

    source = found
    if name.startswith("sklearn"):
        source = Source(f"{name} held out", {w: partial(split, w) for w in ("train", "test")})
    texts = {"train": modules[:-2], "test": modules[-2:]}
    embedded.make_scenes.cache_clear()
    with (
        mock.patch.object(embedded, "digit_images", digits),
        mock.patch.object(embedded, "MODULES", texts),
        mock.patch("elastic_kfac.data.shards.open_source", lambda *_, **__: source),
    ):
        yield
    embedded.make_scenes.cache_clear()


def shards_of(task: str, folder: Path) -> dict[str, str]:
    """The set of a task and the one for tuning, made where they are missing."""
    source = read_config(CONFIGS / f"{task}.yaml").data.source
    assert source is not None
    name = source.replace(":", "_")
    made = {"tuning": folder / f"{name}_tuning", "judged": folder / name}
    make_shards(source, made["judged"])
    with held_out(source):
        make_shards(source, made["tuning"])
    return {key: str(path) for key, path in made.items()}


def configured(task: str, method: str, lr: float | None, seed: int, shards: str) -> Config:
    """The configuration of one run."""
    changes: dict[str, Any] = {} if method == "kfac" else {"kfac.enabled": "false"}
    if method != "kfac":
        changes |= GRIDS[method][0]
    if lr is not None:
        changes["optimizer.lr"] = lr
    changes |= {
        "train.seed": seed,
        "data.shards": shards,
        "train.eval_every_epochs": EVALUATIONS[task],
    }
    return read_config(CONFIGS / f"{task}.yaml", tuple(f"{k}={v}" for k, v in changes.items()))


def train(config: Config, *, stop: bool) -> dict[str, Any]:
    """One run: the metric and the loss at every evaluation."""
    goal = config.train.goal
    assert goal is not None
    datasets = open_datasets(config)
    began = time.process_time()
    points: list[list[float]] = []
    try:
        trainer = RankTrainer(config, Communicator.solo(), datasets)
        better = max if trainer.direction == "max" else min
        while not trainer.finished:
            trainer.step()
            if trainer.epoch_end_is_due:
                trainer.end_epoch()
            if trainer.evaluation_is_due:
                found = trainer.evaluate()
                points.append([round(trainer.fractional_epoch, 3), found[goal.metric], found.loss])
                if stop and better(found[goal.metric], goal.value) == found[goal.metric]:
                    break
        steps = trainer.progress.step
    except NumericalError:
        steps, better = -1, max
        points.append([math.inf, math.nan, math.nan])
    finally:
        datasets.close()
    reached = [p[0] for p in points if better(p[1], goal.value) == p[1]]
    return {
        "epochs_to_target": reached[0] if reached else None,
        "steps": steps,
        "cpu_s": round(time.process_time() - began, 1),
        "curve": [[float(f"{value:.5g}") for value in p] for p in points],
    }


class Results:
    """The file of results, written after every run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {
            "what": "epochs to the target on the test split; rates tuned on other data and another seed",
            "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": 1},
            "versions": {
                "elastic_kfac": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "grids": {name: list(grid) for name, (_, grid) in GRIDS.items()},
            "targets": {},
            "summary": {},
            "runs": {},
        }
        if path.exists():
            self.found |= json.loads(path.read_text())

    def run(self, key: str, config: Config, *, stop: bool) -> dict[str, Any]:
        """The run of this name, trained unless it is there."""
        runs = self.found["runs"]
        if key not in runs:
            runs[key] = train(config, stop=stop)
            shown = runs[key]["curve"][-1]
            print(
                f"{key}: {runs[key]['epochs_to_target']} {shown} {runs[key]['cpu_s']} s", flush=True
            )
            self.save()
        return dict(runs[key])

    def save(self) -> None:
        runs = ",\n".join(
            f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in self.found["runs"].items()
        )
        head = json.dumps({k: v for k, v in self.found.items() if k != "runs"}, indent=1)
        text = head.removesuffix("\n}") + f',\n "runs": {{\n{runs}\n }}\n}}\n'
        part = self.path.with_suffix(".part")
        part.write_text(text.replace("NaN", "null").replace("Infinity", "null"))
        part.replace(self.path)


def best_rate(results: Results, task: str, method: str, shards: str) -> float:
    """The rate whose metric on the held-out part is best at the end."""
    goal = read_config(CONFIGS / f"{task}.yaml").train.goal
    assert goal is not None
    ends = {}
    for lr in GRIDS[method][1]:
        config = configured(task, method, lr, TUNING_SEED, shards)
        curve = results.run(f"{task} | tuning | {method} {lr:g}", config, stop=False)["curve"]
        ends[lr] = curve[-1][1]
    finite = {lr: end for lr, end in ends.items() if end is not None and math.isfinite(end)}
    sign = -1 if goal.metric in ("perplexity", "bits_per_byte", "loss", "rmse") else 1
    return max(finite, key=lambda lr: sign * finite[lr])


def compare(results: Results, task: str, seeds: int, folder: Path) -> None:
    shards = shards_of(task, folder)
    goal = read_config(CONFIGS / f"{task}.yaml").train.goal
    assert goal is not None
    rates = {method: best_rate(results, task, method, shards["tuning"]) for method in GRIDS}
    rows: dict[str, Any] = {}
    for method in METHODS:
        runs = []
        for seed in range(seeds):
            config = configured(task, method, rates.get(method), seed, shards["judged"])
            runs.append(results.run(f"{task} | judged | {method} | {seed}", config, stop=True))
        epochs = [run["epochs_to_target"] for run in runs]
        known = sorted(math.inf if each is None else each for each in epochs)
        middle = statistics.median_high(known)
        rows[method] = {
            "lr": rates.get(method, "as configured"),
            "epochs_to_target": epochs,
            "median": None if math.isinf(middle) else middle,
            "cpu_s": [run["cpu_s"] for run in runs],
        }
    results.found["targets"][task] = {"metric": goal.metric, "value": goal.value}
    results.found["summary"][task] = rows
    results.save()


def show(summary: Mapping[str, Any]) -> str:
    lines = ["| task | " + " | ".join(METHODS) + " |", "|---|" + "---|" * len(METHODS)]
    for task, rows in summary.items():
        cells = [
            f"{row['median'] if row['median'] is not None else '–'} {row['epochs_to_target']}"
            for row in (rows[method] for method in METHODS)
        ]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(EVALUATIONS), choices=EVALUATIONS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the shard sets")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "workloads.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(arguments.out)
    for task in arguments.tasks:
        compare(results, task, arguments.seeds, arguments.data)
    print(show({task: results.found["summary"][task] for task in arguments.tasks}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
