"""DistNewton's own experiment: training loss over epochs by number of workers (Arnold and Wang 2017).

    python benchmarks/studies/dist_newton.py [--data FOLDER] [--epochs 15] [--seeds 3] [--out FILE]

The convnet of five layers and about 16,000 parameters, tanh and ReLU, a batch of 256 split over m
workers. A round: every worker takes one SGD step on its part, then the workers are merged. `paper`
merges as published (τ = lr, gradients on each worker's part), `split` takes a whole Newton step
where curvature is known (absolute values) and the rate elsewhere, with gradients on the whole
batch. A round of `paper` has two gradients per sample, so `sgd 2` has two steps per round; `sgd`
has one. Data are scikit-learn's digits, or `mnist_train.parquet` of --data.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from elastic_kfac.errors import NumericalError
from elastic_kfac.optimizers.dist_newton import DistNewton, merge
from elastic_kfac.zoo.convolutional import distnewton_cnn

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import facts, write_result

BATCH = 256
WORKERS = (2, 4, 8)
METHODS = ("sgd", "sgd 2", *(f"{kind} m={m}" for kind in ("paper", "split") for m in WORKERS))
RATES = (0.3, 1.0)
"""A moderate and a large one."""


def samples(folder: Path | None, count: int) -> tuple[Tensor, Tensor]:
    """Images [n, 1, H, W] with mean 0 and deviation 1, and their classes."""
    if folder is None:
        found = load_digits()
        x, y = torch.tensor(found.images)[:, None].float(), torch.tensor(found.target)
    else:
        from elastic_kfac.data.sources import open_source

        split = open_source(f"parquet:{folder / 'mnist'}").split("train")
        rows = next(split.read(0, count))
        from elastic_kfac.data.decode import decode

        x = torch.stack([torch.from_numpy(decode(one)) for one in rows.values["image"]]).float()
        y = torch.tensor(rows.values["label"])
    x, y = x[:count], y[:count].long()
    return (x - x.mean()) / x.std(), y


def gradient(model: nn.Module, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The gradient [n] of the mean loss at θ."""
    vector_to_parameters(theta, model.parameters())
    loss = F.cross_entropy(model(x), y)
    return parameters_to_vector(torch.autograd.grad(loss, list(model.parameters()))).detach()


def round_of(
    method: str, model: nn.Module, theta: Tensor, x: Tensor, y: Tensor, lr: float
) -> Tensor:
    """The parameters after one batch."""
    if method.startswith("sgd"):
        for _ in range(2 if method == "sgd 2" else 1):
            theta = theta - lr * gradient(model, theta, x, y)
        return theta
    kind, m = method.split(" m=")
    parts = list(zip(x.chunk(int(m)), y.chunk(int(m)), strict=True))
    thetas = [theta - lr * gradient(model, theta, *part) for part in parts]
    own = parts if kind == "paper" else [(x, y)] * int(m)
    gradients = [gradient(model, t, *part) for t, part in zip(thetas, own, strict=True)]
    options = DistNewton(lr) if kind == "paper" else DistNewton(1.0, gradient_lr=lr, mode="abs")
    return merge(thetas, gradients, options).parameters


def curve(
    method: str, activation: str, lr: float, seed: int, data: tuple[Tensor, Tensor], epochs: int
) -> list[float]:
    """The training loss after every epoch; it ends where the loss is not finite."""
    x, y = data
    torch.manual_seed(seed)
    model = distnewton_cnn(10, tuple(x.shape[1:]), activation=activation)  # type: ignore[arg-type]
    theta = parameters_to_vector(model.parameters()).detach()
    order, losses = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(BATCH):
            try:
                theta = round_of(method, model, theta, x[rows], y[rows], lr)
            except NumericalError:
                theta = theta * math.nan
        vector_to_parameters(theta, model.parameters())
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(x), y)))
        if not math.isfinite(losses[-1]):
            break
    return losses


def claims(runs: dict[str, list[float]], seeds: int) -> dict[str, Any]:
    """The published trends, by the mean loss at the end over seeds (null: a run diverged)."""

    def end(activation: str, lr: float, method: str) -> float:
        found = [runs[f"{activation} | {lr:g} | {method} | {seed}"][-1] for seed in range(seeds)]
        return statistics.mean(found)

    ends = {
        f"{a} | {lr:g}": {method: end(a, lr, method) for method in METHODS}
        for a in ("tanh", "relu")
        for lr in RATES
    }
    tanh = ends[f"tanh | {RATES[0]:g}"]
    found: dict[str, Any] = {"end": ends}
    for kind in ("paper", "split"):
        by_m = [tanh[f"{kind} m={m}"] for m in WORKERS]
        found[f"{kind} improves with m (tanh, rate {RATES[0]:g})"] = sorted(by_m)[::-1] == by_m
        found[f"{kind} m=8 beats SGD at equal gradients"] = by_m[-1] < tanh["sgd 2"]
    large = {a: ends[f"{a} | {RATES[1]:g}"] for a in ("tanh", "relu")}
    for activation, row in large.items():
        worse = [m for m in METHODS if not row[m] < math.log(10)]
        found[f"{activation}, rate {RATES[1]:g}: no better than chance"] = worse
    return found


def draw(runs: dict[str, list[float]], seeds: int, out: Path) -> None:
    """Loss over epochs, the mean over seeds: a panel per activation and rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True)
    for row, activation in zip(axes, ("tanh", "relu"), strict=True):
        for axis, lr in zip(row, RATES, strict=True):
            for method in METHODS:
                found = [runs[f"{activation} | {lr:g} | {method} | {s}"] for s in range(seeds)]
                means = [statistics.mean(each) for each in zip(*found, strict=False)]
                style = {"s": "-", "p": "--"}[method[0]] if not method.startswith("split") else ":"
                axis.plot(range(1, len(means) + 1), means, style, label=method)
            axis.set_title(f"{activation}, rate {lr:g}")
            axis.set_ylim(0, 3)
            axis.grid(visible=True, alpha=0.3)
            axis.set_xlabel("epoch")
            axis.set_ylabel("training loss (NLL)")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with mnist_train.parquet")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    out = Path(__file__).parents[1] / "results" / "dist_newton.json"
    parser.add_argument("--out", type=Path, default=out)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data, runs = samples(given.data, given.samples), {}
    for activation in ("tanh", "relu"):
        for lr in RATES:
            for method in METHODS:
                for seed in range(given.seeds):
                    key = f"{activation} | {lr:g} | {method} | {seed}"
                    runs[key] = curve(method, activation, lr, seed, data, given.epochs)
                print(f"{key[:-4]}: {[round(v, 3) for v in runs[key][-1:]]}", flush=True)
    found = claims(runs, given.seeds)
    result = {
        "what": "training loss per epoch, mean over seeds in `end`; chance is 2.303",
        "data": "digits" if given.data is None else "mnist",
        "samples": len(data[0]),
        "seeds": given.seeds,
        **facts(),
        "claims": found,
        "runs": runs,
    }
    write_result(given.out, result)
    draw(runs, given.seeds, given.out.with_suffix(".png"))
    for name, value in found.items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
