"""Every kind of task in small: K-FAC as it comes against tuned SGD, AdamW and LAMB.

    python benchmarks/workloads.py [--tasks char_gpt ...] [--seeds 3] [--out FILE]

The tasks are those of `jobs/configs/` with their cosine rate, in smaller models and shorter runs
(`SMALLER`). SGD, AdamW and LAMB get one run per rate of a grid of the same size, on a part of the
training data, judged by another part (whole modules of text, other digits, other patients), with a
seed that is not used again; the best rate has the best metric at the end. K-FAC (over SGD 0.1/0.9) is
not tuned. The target is nine tenths of the best of these ends, of losses and bits a twentieth above it
(regression: the configuration's, from a cross-validation). Then every method trains on the whole
training split with further seeds and is judged by the test split: epochs up to the first evaluation at
the target.

Called again, it continues where it stopped. CPU seconds are those of the process, one thread.
"""

from __future__ import annotations

import argparse
import json
import math
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

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config, read_config
from elastic_kfac.data.dataset import open_datasets
from elastic_kfac.data.shards import make_shards
from elastic_kfac.data.sources import Source, embedded, open_source
from elastic_kfac.data.sources.generated import digit_images
from elastic_kfac.errors import NumericalError
from elastic_kfac.training.rank import RankTrainer

sys.path.insert(0, str(Path(__file__).parent))
from machine import facts, write_result

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "jobs" / "configs"
SMALLER: Mapping[str, dict[str, Any]] = {
    "regression": {"train.eval_every_epochs": 0.5},
    "char_gpt": {
        "model.arguments": "{layers: 1, width: 32, heads: 4, tied: false}",
        "train.global_batch_size": 16,
        "train.epochs": 1,
        "train.eval_every_epochs": 0.1,
    },
    "masked_lm": {
        "model.arguments": "{layers: 1, width: 32, heads: 4, tied: false, initial_std: 0.1}",
        "train.global_batch_size": 32,
        "train.epochs": 1,
        "train.target": "{metric: perplexity, value: 1}",
        "train.eval_every_epochs": 0.1,
    },
    "unet_scenes": {
        "model.arguments": "{width: 4, depth: 2, batch_norm: true}",
        "train.global_batch_size": 20,
        "train.epochs": 3,
        "train.target": "{metric: loss, value: 0}",
        "train.eval_every_epochs": 0.5,
    },
    "detector_scenes": {
        "model.arguments": "{width: 6, sizes: [8, 16]}",
        "train.global_batch_size": 20,
        "train.epochs": 3,
        "train.eval_every_epochs": 0.5,
    },
}
"""Tasks, and how they differ from their configurations."""
GRIDS: Mapping[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "sgd": ({"optimizer.name": "sgd"}, (0.03, 0.1, 0.3)),
    "adamw": (
        {"optimizer.name": "adamw", "optimizer.weight_decay": 0.01},
        (1e-3, 3e-3, 1e-2),
    ),
    "lamb": ({"optimizer.name": "lamb", "optimizer.weight_decay": 0.01}, (3e-3, 1e-2, 3e-2)),
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
    changes: dict[str, Any] = {**SMALLER[task], "train.seed": seed, "data.shards": shards}
    if method != "kfac":
        changes |= {"kfac.enabled": "false", **GRIDS[method][0]}
    if lr is not None:
        changes["optimizer.lr"] = lr
    return read_config(CONFIGS / f"{task}.yaml", tuple(f"{k}={v}" for k, v in changes.items()))


def train(config: Config, target: float | None) -> dict[str, Any]:
    """One run: the metric and the loss at every evaluation, to the target or the end."""
    datasets = open_datasets(config)
    began = time.process_time()
    points: list[list[float]] = []
    reached = None
    trainer = RankTrainer(config, Communicator.solo(), datasets)
    try:
        while not trainer.finished and reached is None:
            trainer.step()
            if trainer.evaluation_is_due:
                found = trainer.evaluate()
                value, epoch = found[trainer.metric], round(trainer.fractional_epoch, 3)
                points.append([epoch, value, found.loss])
                if target is not None and is_at(value, target, trainer.direction):
                    reached = epoch
    except NumericalError:
        points.append([math.inf, math.nan, math.nan])
    finally:
        datasets.close()
    cpu_s = round(time.process_time() - began, 1)
    return {"reached": reached, "steps": trainer.progress.step, "cpu_s": cpu_s, "curve": points}


def is_at(value: float, target: float, direction: str) -> bool:
    return value >= target if direction == "max" else value <= target


class Results:
    """The file of results, written after every run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {
            "what": "epochs to the target on the test split; rates tuned on other data and another seed",
            **facts(),
            "grids": {name: list(grid) for name, (_, grid) in GRIDS.items()},
            "targets": {},
            "summary": {},
            "runs": {},
        }
        if path.exists():
            self.found |= json.loads(path.read_text())

    def run(self, key: str, config: Config, target: float | None = None) -> dict[str, Any]:
        """The run of this name, trained unless it is there."""
        runs = self.found["runs"]
        if key not in runs:
            runs[key] = train(config, target)
            last = runs[key]["curve"][-1]
            print(f"{key}: {runs[key]['reached']} {last} {runs[key]['cpu_s']} s", flush=True)
            self.save()
        return dict(runs[key])

    def save(self) -> None:
        write_result(self.path, self.found)


def tuned(results: Results, task: str, method: str, shards: str) -> tuple[float, float]:
    """The rate whose metric on the held-out part is best at the end, and that metric."""
    ends = {}
    for lr in GRIDS[method][1]:
        config = configured(task, method, lr, TUNING_SEED, shards)
        end = results.run(f"{task} | tuning | {method} {lr:g}", config)["curve"][-1][1]
        if end is not None and math.isfinite(end):
            ends[lr] = end
    choose = min if is_falling(config) else max
    best = choose(ends, key=ends.__getitem__)
    return best, ends[best]


def is_falling(config: Config) -> bool:
    """Whether smaller values of the target's metric are better."""
    assert config.train.goal is not None
    return config.train.goal.metric in ("perplexity", "bits_per_byte", "loss")


def compare(results: Results, task: str, seeds: int, folder: Path) -> None:
    shards = shards_of(task, folder)
    found = {method: tuned(results, task, method, shards["tuning"]) for method in GRIDS}
    config = configured(task, "kfac", None, 0, shards["judged"])
    goal = config.train.goal
    assert goal is not None
    ends = [end for _, end in found.values()]
    target = 1.05 * min(ends) if is_falling(config) else 0.9 * max(ends)
    if task == "regression":
        target = goal.value
    rows: dict[str, Any] = {}
    for method in METHODS:
        lr = found[method][0] if method in found else None
        runs = []
        for seed in range(seeds):
            config = configured(task, method, lr, seed, shards["judged"])
            runs.append(results.run(f"{task} | judged | {method} | {seed}", config, target))
        epochs = [run["reached"] for run in runs]
        middle = statistics.median_high(math.inf if e is None else e for e in epochs)
        rows[method] = {
            "lr": "as configured" if lr is None else lr,
            "epochs_to_target": epochs,
            "median": middle,
            "cpu_s": [run["cpu_s"] for run in runs],
        }
    results.found["targets"][task] = {"metric": goal.metric, "value": target, "held out": ends}
    results.found["summary"][task] = rows
    results.save()


def show(summary: Mapping[str, Any]) -> str:
    lines = ["| task | " + " | ".join(METHODS) + " |", "|---|" + "---|" * len(METHODS)]
    for task, rows in summary.items():
        cells = [
            f"{row['median']} of {row['epochs_to_target']}"
            for row in (rows[method] for method in METHODS)
        ]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(SMALLER), choices=SMALLER)
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
