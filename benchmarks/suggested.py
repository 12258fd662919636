"""What `elastic-kfac suggest` is worth: its settings against the given ones, with seeds it has not seen.

    python benchmarks/suggested.py [--minutes 2] [--seeds 5] [--out benchmarks/results/suggested.json]

Each configuration is one that a newcomer writes (shards, model, epochs; everything else default). Trains
in this process on one thread; CPU seconds are those of the steps.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic_kfac import __version__
from elastic_kfac.config import Config, TrainConfig, parse_config
from elastic_kfac.data.shards import make_shards
from elastic_kfac.runs.suggestion import Trial, TrialRunner, suggest

HERE = Path(__file__).parent
FIRST_SEED = 2000


def value_model(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """A user's own: one number per image."""
    width = math.prod(image_shape)
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()),
        nn.Linear(64, 1),
    )


class Value:
    """A user's own loss: half the squared distance to the digit."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * (outputs.squeeze(1) - labels.to(outputs.dtype)).square().sum()

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs.squeeze(1).round() == labels).sum()


def value_task(train: TrainConfig) -> Value:
    return Value()


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "digits, small CNN, 5 epochs": {"train": {"epochs": 5}},
    "digits, MLP, 10 epochs, batch 512": {
        "model": {"name": "mlp"},
        "train": {"epochs": 10, "global_batch_size": 512},
    },
    "value of a digit, own regression, 20 epochs": {
        "model": {"name": "suggested:value_model"},
        "train": {"epochs": 20, "global_batch_size": 64, "loss": "suggested:value_task"},
    },
}


def measure(config: Config, minutes: float, seeds: int) -> dict[str, Any]:
    """A search, and both settings with fresh seeds."""
    found = suggest(config, minutes=minutes, show=_show)
    found.share = 1.0
    runner = TrialRunner(found, None, math.inf, _show)
    fresh = range(FIRST_SEED, FIRST_SEED + seeds)
    rows = {
        name: [_row(runner.run(changes, name, seed)) for seed in fresh]
        for name, changes in (("given", {}), ("suggested", dict(found.changes)))
    }
    pairs = [
        (given["test_loss"], own["test_loss"]) for given, own in zip(*rows.values(), strict=True)
    ]
    return {
        "changes": dict(found.changes),
        "trials": len(found.trials) + 2 * len(found.confirming),
        "test_loss": {n: _median(r["test_loss"] for r in each) for n, each in rows.items()},
        "accuracy": {n: _median(r["accuracy"] for r in each) for n, each in rows.items()},
        "cpu_s": {n: _median(r["cpu_s"] for r in each) for n, each in rows.items()},
        "better": f"{sum(own < given for given, own in pairs)} of {len(pairs)}",
        "runs": rows,
    }


def _median(values: Any) -> float:
    return float(f"{statistics.median(values):.4g}")


def _row(trial: Trial) -> dict[str, Any]:
    return {
        "seed": trial.seed,
        "test_loss": float(f"{trial.score:.4g}"),
        "accuracy": trial.metrics["accuracy"],
        "cpu_s": round(trial.seconds, 3),
        "ended": trial.ended,
    }


def _show(found: Any, trial: Trial) -> None:
    print(f"{trial.label:30s} seed {trial.seed} {trial.score:.4g} {trial.ended}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "suggested.json")
    arguments = parser.parse_args()
    sys.path.insert(0, str(HERE))  # for `suggested:value_model`
    with tempfile.TemporaryDirectory() as folder:
        make_shards("digits", f"{folder}/digits")
        results = {}
        for name, values in CONFIGURATIONS.items():
            print(name, file=sys.stderr)
            config = parse_config({"data": {"shards": f"{folder}/digits"}, **values})
            results[name] = measure(config, arguments.minutes, arguments.seeds)
    content = {
        "benchmark": "suggested",
        "what": "medians over fresh seeds, given configuration against the suggested one",
        "settings": {"minutes": arguments.minutes, "seeds": arguments.seeds, "threads": 1},
        "hardware": platform.processor() or platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "elastic_kfac": __version__,
        },
        "results": results,
    }
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    for name, row in results.items():
        print(f"{name}: test loss {row['test_loss']}, better in {row['better']}: {row['changes']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
