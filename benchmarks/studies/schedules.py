"""Batch and rate schedules over epochs, what they cost, LARS and LAMB at large batch, ABSA's robustness.

    python benchmarks/studies/schedules.py [--seeds 3] [--pairs 30] [--out FILE]

CLUSTERS10 as in `clusters10.yaml`, b0 = 32, 45 epochs, in one process.

- Every schedule at B = 1,024: batch size and rate over epochs (the figure), and the cost table of Yao
  et al. (2018) in CPU seconds of our own: updates, time per update of each schedule (a batch that grows
  has updates of growing cost) and per eigenvalue, and the total.
- LARS and LAMB against linear scaling (FB) and the small batch's rate (BL) at B = 1,024 and 4,096: rates
  of LARS and LAMB are the best of a grid on another seed; all but BL have 5 epochs of warm-up.
- ABSA against ABS at B = 1,024, in pairs of one seed: accuracy on attacked samples.

Called again, it continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from loop import base_of, configured, train

from elastic_kfac.training.rank import RankTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import facts, write_result

EPOCHS = 45
LARGE = 1024
SIZES = (1024, 4096)
POLICIES: dict[str, dict[str, Any]] = {
    "BL": {"batch.policy": "bl"},
    "FB": {"batch.policy": "fb", "batch.warmup_epochs": 5},
    "GG": {"batch.policy": "gg"},
    "ABS": {"batch.policy": "abs"},
    "ABSA": {"batch.policy": "absa", "adversarial.attack": "fgsm", "adversarial.radius": 0.0266},
}
WARM = {"batch.policy": "constant", "optimizer.warmup_epochs": 5}
RULES: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "LARS": ({**WARM, "optimizer.name": "lars", "optimizer.trust": 0.01}, (0.5, 2.0, 8.0, 32.0)),
    "LAMB": ({**WARM, "optimizer.name": "lamb"}, (0.003, 0.01, 0.03, 0.1)),
}
ATTACK = {"adversarial.eval_attack": "fgsm", "adversarial.eval_radius": 0.1066}
TUNING_SEED = 100
STUDENT_95 = {2: 12.71, 3: 4.303, 5: 2.776, 10: 2.262, 12: 2.201, 15: 2.145, 20: 2.093, 30: 2.045}


def at_epoch(trainer: RankTrainer) -> dict[str, Any]:
    """What the next epoch begins with."""
    position = trainer.position
    rates = trainer.rates.at(trainer.fractional_epoch, trainer.batch.lr_factor(position))
    return {
        "batch": trainer.batch.size(1, position),
        "lr": rates.lr,
        "attacked": trainer.batch.attacked_fraction(position),
    }


class Study:
    def __init__(self, out: Path, data: Path) -> None:
        self.out, self.base = out, base_of("clusters10", data)
        self.runs: dict[str, Any] = {}
        if out.exists():
            self.runs = json.loads(out.read_text())["runs"]

    def run(self, key: str, changes: dict[str, Any]) -> dict[str, Any]:
        if key not in self.runs:
            given = {"train.epochs": EPOCHS, "train.eval_every_epochs": EPOCHS, **ATTACK, **changes}
            found = train(configured(self.base, given), at_epoch)
            rows = found.pop("epochs")
            found |= {name: [row[name] for row in rows] for name in ("batch", "lr")}
            self.runs[key] = found
            print(key, found.get("end"), found["steps"], flush=True)
            write_result(self.out, {"runs": self.runs})
        return dict(self.runs[key])

    def policy(self, name: str, size: int, seed: int) -> dict[str, Any]:
        changes = {**POLICIES[name], "batch.max_batch_size": size, "train.seed": seed}
        return self.run(f"{name} | {size} | {seed}", changes)

    def rule(self, name: str, size: int, lr: float, seed: int) -> dict[str, Any]:
        changes = {**RULES[name][0], "train.global_batch_size": size, "optimizer.lr": lr}
        return self.run(f"{name} | {size} | lr {lr:g} | {seed}", {**changes, "train.seed": seed})


def accuracy(run: dict[str, Any]) -> float:
    return float(run["end"]["accuracy"]) if run.get("end") and not run["diverged"] else 0.1


def costs(study: Study, seeds: int) -> dict[str, Any]:
    """Our own cost table: T(update)·updates + T(eigenvalue)·epochs against what was measured."""
    table = {}
    for name in POLICIES:
        runs = [study.policy(name, LARGE, seed) for seed in range(seeds)]
        updates = statistics.mean(run["steps"] for run in runs)
        per_update = statistics.mean(run["step_cpu_s"] / run["steps"] for run in runs)
        hessian = statistics.mean(run["hessian_cpu_s"] / len(run["batch"]) for run in runs)
        table[name] = {
            "updates": updates,
            "cpu ms per update": 1e3 * per_update,
            "cpu ms per eigenvalue": 1e3 * hessian if name.startswith("ABS") else 0.0,
            "total cpu s": statistics.mean(r["step_cpu_s"] + r["hessian_cpu_s"] for r in runs),
            "accuracy": statistics.mean(map(accuracy, runs)),
        }
    # The source has one cost per update for all batch sizes; ours by the schedules of one size.
    small = study.run("b0", {"train.seed": 0})
    table["SGD, b0 = 32"] = {
        "updates": small["steps"],
        "cpu ms per update": 1e3 * small["step_cpu_s"] / small["steps"],
        "total cpu s": small["step_cpu_s"],
        "accuracy": accuracy(small),
    }
    total = table["SGD, b0 = 32"]["total cpu s"]
    for row in table.values():
        row["speed-up"] = total / row["total cpu s"]
    return table


def large_batch(study: Study, seeds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for size in SIZES:
        row: dict[str, Any] = {}
        for name in ("BL", "FB"):
            row[name] = [accuracy(study.policy(name, size, seed)) for seed in range(seeds)]
        for name, (_, rates) in RULES.items():
            tried = {lr: accuracy(study.rule(name, size, lr, TUNING_SEED)) for lr in rates}
            best = max(tried, key=lambda lr: tried[lr])
            row[f"{name}, lr {best:g}"] = [
                accuracy(study.rule(name, size, best, seed)) for seed in range(seeds)
            ]
        found[str(size)] = row
    return found


def robustness(study: Study, pairs: int) -> dict[str, Any]:
    """The difference of accuracy on attacked samples, ABSA − ABS, with its interval."""
    differences = []
    for seed in range(pairs):
        one, other = (study.policy(name, LARGE, seed)["end"] for name in ("ABSA", "ABS"))
        differences.append(one["attacked_accuracy"] - other["attacked_accuracy"])
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    factor = STUDENT_95[max(n for n in STUDENT_95 if n <= pairs)]
    half = factor * deviation / math.sqrt(pairs)
    verdict = "holds" if mean - half > 0 else "fails" if mean + half < 0 else "undecided"
    return {
        "says": "ABSA is more accurate on attacked samples than ABS",
        "pairs": pairs,
        "mean": mean,
        "interval": [mean - half, mean + half],
        "verdict": verdict,
        "differences": differences,
    }


def draw(study: Study, out: Path) -> None:
    """Batch size and learning rate over epochs, one line per schedule (seed 0)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True)
    for name in POLICIES:
        run = study.policy(name, LARGE, 0)
        for axis, column in zip(axes, ("batch", "lr"), strict=True):
            axis.step(range(1, len(run[column]) + 1), run[column], where="post", label=name)
    for axis, label in zip(axes, ("batch size", "learning rate"), strict=True):
        axis.set_yscale("log", base=2 if label.startswith("batch") else 10)
        axis.set_ylabel(label)
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend()
    axes[1].set_xlabel("epochs done")
    figure.tight_layout()
    figure.savefig(out, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=30, help="seeds of ABS and ABSA")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the shard sets")
    out = Path(__file__).parents[1] / "results" / "schedules.json"
    parser.add_argument("--out", type=Path, default=out)
    given = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(given.out, given.data)
    result = {
        "what": "CLUSTERS10, 45 epochs: schedules, their CPU cost, LARS and LAMB, ABSA's robustness",
        "seeds": given.seeds,
        **facts(),
        "cost table, B = 1024": costs(study, given.seeds),
        "large batch, accuracy by seed": large_batch(study, given.seeds),
        "robustness": robustness(study, given.pairs),
    }
    write_result(given.out, {**result, "runs": study.runs})
    draw(study, given.out.with_suffix(".png"))
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
