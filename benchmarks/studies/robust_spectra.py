"""Curvature of robust against plain models, at a small and a large batch (Yao et al. 2018).

    python benchmarks/studies/robust_spectra.py [--seeds 3] [--out FILE]

CLUSTERS10, the MLP of `clusters10.yaml`, 20 epochs at the rate of the small batch (BL), B = 64 and
1,024, plain and with every sample attacked (FGSM, radius 0.0266). Largest eigenvalue and norm of
the gradient over epochs, the twenty largest eigenvalues at the end, both ends of the spectrum, and
accuracy on attacked samples (radius 0.1066). Published: the spectrum grows with the batch, accuracy
on attacked samples falls with it, robust training lowers the largest eigenvalue, and the end point
is no saddle: the smallest eigenvalue is much smaller than the largest in magnitude.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from loop import base_of, configured, train

from elastic_kfac.training.rank import RankTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import facts, write_result

EPOCHS, EVERY = 20, 4
SIZES = (64, 1024)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "robust": {
        "adversarial.attack": "fgsm",
        "adversarial.radius": 0.0266,
        "adversarial.fraction": 1.0,
    },
}
NAMES = {"largest": "largest eigenvalue", "sum of 20": "sum of the twenty largest eigenvalues"}
COMMON: dict[str, Any] = {
    "train.epochs": EPOCHS,
    "train.eval_every_epochs": EPOCHS,
    "optimizer.decay_epochs": [7, 13, 18],
    "analysis.samples": 512,
    "analysis.top_k": 20,
    "analysis.lanczos_steps": 60,
    "adversarial.eval_attack": "fgsm",
    "adversarial.eval_radius": 0.1066,
}


def curvature(trainer: RankTrainer) -> dict[str, Any]:
    """The spectrum after some of the epochs."""
    if trainer.progress.epoch % EVERY:
        return {}
    row = trainer.analyse()
    found = row["analysis"]["spectrum"]
    return {
        "epoch": trainer.progress.epoch,
        "gradient_norm": row["gradient_norm"],
        "top": found["eigenvalues"],
        "largest": found["largest"],
        "smallest": found["smallest"],
    }


def claims(runs: dict[str, Any], seeds: int) -> list[dict[str, Any]]:
    """The published trends over seeds."""

    def values(kind: str, size: int, column: str) -> list[float]:
        chosen = [runs[f"{kind} | {size} | {seed}"] for seed in range(seeds)]
        if column == "attacked_accuracy":
            return [run["end"][column] for run in chosen]
        last = [run["epochs"][-1] for run in chosen]
        if column == "ratio":
            return [abs(min(row["smallest"], 0)) / row["largest"] for row in last]
        if column == "sum of 20":
            return [sum(row["top"]) for row in last]
        return [row[column] for row in last]

    small, large = SIZES
    rows = []

    def claim(says: str, ours: list[float], theirs: list[float]) -> None:
        seeds_for = sum(a > b for a, b in zip(ours, theirs, strict=True))
        verdict = "holds" if seeds_for == seeds else "fails" if seeds_for == 0 else "mixed"
        means = [statistics.mean(ours), statistics.mean(theirs)]
        rows.append({"says": says, "verdict": verdict, "seeds": seeds_for, "means": means})

    for kind in KINDS:
        for column in ("largest", "sum of 20"):
            text = f"{kind}: the {NAMES[column]} grows with B"
            claim(text, values(kind, large, column), values(kind, small, column))
        text = f"{kind}: accuracy on attacked samples falls with B"
        attacked = "attacked_accuracy"
        claim(text, values(kind, small, attacked), values(kind, large, attacked))
    for size in SIZES:
        for column in ("largest", "sum of 20"):
            text = f"B = {size}: robust training lowers the {NAMES[column]}"
            claim(text, values("plain", size, column), values("robust", size, column))
        text = f"B = {size}: robust training is more accurate on attacked samples"
        claim(text, values("robust", size, attacked), values("plain", size, attacked))
        for kind in KINDS:
            text = f"{kind}, B = {size}: no saddle (|smallest| below a tenth of the largest)"
            claim(text, [0.1] * seeds, values(kind, size, "ratio"))
    return rows


def draw(runs: dict[str, Any], seeds: int, out: Path) -> None:
    """λ_1 and the gradient's norm over epochs, and the twenty largest eigenvalues (means over seeds)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4))
    for kind in KINDS:
        for size in SIZES:
            chosen = [runs[f"{kind} | {size} | {seed}"]["epochs"] for seed in range(seeds)]
            epochs = [row["epoch"] for row in chosen[0]]
            style = {"label": f"{kind}, B = {size}", "linestyle": "--" if kind == "robust" else "-"}
            for axis, column in zip(axes, ("largest", "gradient_norm"), strict=False):
                means = [
                    statistics.mean(row[column] for row in rows)
                    for rows in zip(*chosen, strict=True)
                ]
                axis.plot(epochs, means, **style)
            tops = zip(*(rows[-1]["top"] for rows in chosen), strict=True)
            axes[2].plot(range(1, 21), [statistics.mean(map(abs, each)) for each in tops], **style)
    labels = ("largest eigenvalue", "norm of the gradient", "eigenvalues at the end")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_yscale("log")
        axis.set_title(label)
        axis.set_xlabel("rank" if label.startswith("eig") else "epoch")
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(out, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the shard sets")
    out = Path(__file__).parents[1] / "results" / "robust_spectra.json"
    parser.add_argument("--out", type=Path, default=out)
    given = parser.parse_args()
    torch.set_num_threads(1)
    base = base_of("clusters10", given.data)
    runs: dict[str, Any] = json.loads(given.out.read_text())["runs"] if given.out.exists() else {}
    for seed in range(given.seeds):
        for kind, changes in KINDS.items():
            for size in SIZES:
                key = f"{kind} | {size} | {seed}"
                if key in runs:
                    continue
                sizes = {"train.global_batch_size": size, "train.seed": seed}
                found = train(configured(base, {**COMMON, **changes, **sizes}), curvature)
                found["epochs"] = [row for row in found["epochs"] if row]
                runs[key] = found
                print(key, found["end"], found["epochs"][-1]["largest"], flush=True)
                write_result(given.out, {"runs": runs})
    rows = claims(runs, given.seeds)
    result = {
        "what": "curvature and robustness after 20 epochs; a claim holds if it does in every seed",
        "seeds": given.seeds,
        **facts(),
        "claims": rows,
        "runs": runs,
    }
    write_result(given.out, result)
    draw(runs, given.seeds, given.out.with_suffix(".png"))
    for row in rows:
        print(f"{row['verdict']:6s} {row['seeds']}/{given.seeds}  {row['says']}  {row['means']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
