"""Epochs and updates to a target over the six large-batch recipes (Osawa et al. 2019), at our scale.

    python benchmarks/studies/recipes.py [--seeds 3] [--out FILE]

The recipes of `jobs/configs/recipes/` as they are (rate, tied momentum, decay, mixup, erasing, weight
rescaling, damping, stale statistics, epochs), on scikit-learn's digits with an MLP that has their
BatchNorm: scales drawn from N(1, 0.05²), running averages with decay 0.9, ε = 2e-5. Batches are 16 to 512
of 1,437 samples in the place of 4,096 to 131,072 of 1.28 million. Published: epochs stay constant up to a
batch and then grow slowly (35, 35, 35, 45, 60, 100), while updates keep falling. Our target is
95 % of the test split, evaluated every half epoch; without mixing a run is `plain`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from loop import configured, train, with_shards
from torch import nn

from elastic_kfac.config import load_yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import facts, write_result

RECIPES = Path(__file__).parents[2] / "jobs" / "configs" / "recipes"
BATCHES = {4096: 16, 8192: 32, 16384: 64, 32768: 128, 65536: 256, 131072: 512}
TARGET = 0.95


def network(num_outputs: int, input_shape: tuple[int, ...], width: int = 64) -> nn.Module:
    """Two hidden layers with the recipe's BatchNorm."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = math.prod(input_shape)
    for _ in range(2):
        norm = nn.BatchNorm1d(width, eps=2e-5, momentum=0.1)
        nn.init.normal_(norm.weight, 1.0, 0.05)
        layers += [nn.Linear(features, width), norm, nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, num_outputs))


def changes_of(recipe: int, seed: int, *, plain: bool) -> dict[str, Any]:
    """What our scale changes of a recipe."""
    found = {
        "model.name": "recipes:network",
        "train.global_batch_size": BATCHES[recipe],
        "train.micro_batch_size": None,
        "train.eval_batch_size": 512,
        "train.precision": "fp32",
        "train.target_accuracy": TARGET,
        "train.eval_every_epochs": 0.5,
        "train.seed": seed,
        "elastic.max_workers": 1,
        "resources.use_gpu": False,
        "resources.per_worker": {"CPU": 1},
    }
    return found | ({"mixing.mixup": "none", "mixing.erasing": 0.0} if plain else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the shard sets")
    out = Path(__file__).parents[1] / "results" / "recipes.json"
    parser.add_argument("--out", type=Path, default=out)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, Any] = {}
    table: dict[str, Any] = {}
    for kind in ("recipe", "plain"):
        for recipe, batch in BATCHES.items():
            text = (RECIPES / f"imagenet_{recipe}.yaml").read_text()
            base = load_yaml(text, what=f"recipe {recipe}")
            base["data"] = {"source": "digits"}
            reached = []
            for seed in range(given.seeds):
                changes = changes_of(recipe, seed, plain=kind == "plain")
                config = configured(with_shards(base, given.data), changes)
                found = train(config, lambda trainer: {}, until=TARGET)
                del found["epochs"]
                runs[f"{kind} | {recipe} | {seed}"] = found
                reached.append(found["reached"] or (math.inf, math.inf))
            epochs, updates = ([point[i] for point in reached] for i in (0, 1))
            table[f"{kind} {recipe}"] = {
                "batch": batch,
                "epochs of the recipe": base["train"]["epochs"],
                "epochs to target": epochs,
                "updates to target": updates,
                "median epochs": statistics.median(epochs),
                "median updates": statistics.median(updates),
            }
            print(kind, recipe, table[f"{kind} {recipe}"], flush=True)
    claims: dict[str, Any] = {}
    for kind in ("recipe", "plain"):
        rows = [table[f"{kind} {recipe}"] for recipe in BATCHES]
        updates = [row["median updates"] for row in rows]
        epochs = [row["median epochs"] for row in rows]
        claims[f"{kind}: updates fall with the batch"] = updates == sorted(updates, reverse=True)
        claims[f"{kind}: epochs never fall with the batch"] = epochs == sorted(epochs)
    result = {
        "what": f"epochs and updates to {TARGET:.0%} of the test split, null: not reached",
        "seeds": given.seeds,
        **facts(),
        "claims": claims,
        "table": table,
        "runs": runs,
    }
    write_result(given.out, result)
    print(claims)
    return 0


if __name__ == "__main__":
    sys.exit(main())
