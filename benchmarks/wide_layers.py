"""Layers wider than `max_factor_dim`, and embeddings: time, memory, what is lost against whole factors.

    python benchmarks/wide_layers.py [--out FILE] [--part time|decomposition|quality]

Time: process CPU time, one thread; K-FAC and SGD take turns, step by step; what counts are the ratios.
A head with 50,000 outputs, an fc with 12,544 inputs and a bias, square layers, a table of 30,000 rows.
Decomposition: CPU time of whole factors and of low ranks, cold and from the basis of 10 updates
before, with the share of the trace in the kept pairs and what is missed of the best possible one.
Quality: mean loss over the training set after equal steps, median over seeds, on data that scikit-learn
holds and at widths that whole factors reach, too: digits with 1,024 features, and the next word of its
data sets' descriptions. Every form runs at every damping; the best is its result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import sklearn.datasets
import torch
import torch.nn.functional as F
from machine import cpu_name
from torch import Tensor, nn

from elastic_kfac import KFAC, __version__
from elastic_kfac.curvature import kronecker
from elastic_kfac.curvature.sides import Blocks, Diagonal, LowRank, Side, Whole

PARTS = ("time", "decomposition", "quality")
DAMPINGS = (1e-3, 3e-3, 1e-2, 3e-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--part", choices=PARTS, help="one part alone; the file keeps the others")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="plain steps that are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result: dict[str, object] = {}
    if arguments.part and arguments.out and arguments.out.exists():
        result = json.loads(arguments.out.read_text())
    result["benchmark"] = "wide_layers"
    if arguments.part in (None, "time"):
        result["time"] = [_timed(name, arguments.steps) for name in TIMED]
    if arguments.part in (None, "decomposition"):
        result["decomposition"] = [_decomposed(width) for width in (1024, 2048, 4096)]
    if arguments.part in (None, "quality"):
        result["quality"] = [_quality(name, arguments.seeds) for name in PROBLEMS]
    result["machine"] = {"cpu": cpu_name(), "threads": torch.get_num_threads()}
    result["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "elastic_kfac": __version__,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


# -- time -------------------------------------------------------------------------------------------

TIMED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "head 512 -> 50000, 128 rows": (lambda: nn.Linear(512, 50000), lambda: torch.randn(128, 512)),
    "fc 12544 -> 512, 128 rows": (lambda: nn.Linear(12544, 512), lambda: torch.randn(128, 12544)),
    "linear 2048, 128 rows": (lambda: nn.Linear(2048, 2048), lambda: torch.randn(128, 2048)),
    "linear 4096, 128 rows": (lambda: nn.Linear(4096, 4096), lambda: torch.randn(128, 4096)),
    "two linear 2048, 128 rows": (
        lambda: nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048)),
        lambda: torch.randn(128, 2048),
    ),
    "embedding 30000 x 64, 2048 tokens": (
        lambda: nn.Embedding(30000, 64),
        lambda: torch.randint(30000, (64, 32)),
    ),
    "embedding 30000 x 64, 2048 tokens, momentum 0.7": (
        lambda: nn.Embedding(30000, 64),
        lambda: torch.randint(30000, (64, 32)),
    ),
}


KINDS: dict[str, dict[str, Any]] = {
    "eigen": {},
    "inverse": {"method": "inverse"},
    "rank_64": {"factor_rank": 64},
    "rank_256": {"factor_rank": 256},
}


def _timed(name: str, steps: int) -> dict[str, object]:
    """Plain steps by turns; then, for K-FAC, a step with statistics, and one that decomposes as well."""
    make_model, make_input = TIMED[name]
    torch.manual_seed(0)
    batches, state = [make_input() for _ in range(8)], make_model().state_dict()
    steps *= 20 if name.startswith("embedding") else 1  # they are short

    def stepper(options: dict[str, Any] | None) -> tuple[Callable[[], float], KFAC | None]:
        model = make_model()
        model.load_state_dict(state)
        momentum = 0.7 if "momentum" in name else 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        kfac = None
        if options is not None:
            intervals = {"factor_update_steps": steps + 2, "inverse_update_steps": 2 * (steps + 2)}
            kfac = KFAC(model, lr=optimizer, loss_reduction="mean", **intervals, **options)
        inputs = itertools.cycle(batches)

        def step() -> float:
            x = next(inputs)
            begin = time.process_time()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if kfac is not None:
                kfac.step()
            optimizer.step()
            return 1e3 * (time.process_time() - begin)

        return step, kfac

    steppers = {"sgd": stepper(None)} | {key: stepper(options) for key, options in KINDS.items()}
    first = {key: step() for key, (step, _) in steppers.items()}
    times: dict[str, list[float]] = {key: [step()] for key, (step, _) in steppers.items()}
    for _ in range(steps):
        for key, (step, _) in steppers.items():
            times[key].append(step())
    plain = {key: statistics.median(series[1:]) for key, series in times.items()}
    row: dict[str, object] = {"layer": name, "n": steps, "sgd_ms": round(plain["sgd"], 2)}
    for key in KINDS:
        step, kfac = steppers[key]
        assert kfac is not None
        with_statistics = step()
        usage = kfac.memory_usage()
        row |= {
            f"{key}_plain_ms": round(plain[key], 2),
            f"{key}_plain_over_sgd": round(plain[key] / plain["sgd"], 2),
            f"{key}_statistics_ms": round(with_statistics, 1),
            f"{key}_first_step_ms": round(first[key], 1),
            f"{key}_state_mib": round((usage["total"] - usage["pending"]) / 2**20, 1),
        }
        if key == "eigen":
            row["kept"] = "; ".join(layer.kept for layer in kfac.layers if layer.kept)
    weights = sum(p.numel() for p in make_model().parameters())
    row["weights_mib"] = round(4 * weights / 2**20, 1)
    print(row, flush=True)
    return row


# -- decomposition ----------------------------------------------------------------------------------


def _decomposed(width: int) -> dict[str, object]:
    """Of a moving average (0.95) over the inputs of 30 batches of 128 rows: ReLU of 256 features."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, width, generator=generator) / 16
    scales = torch.logspace(0, -2, 256)
    factor, before = torch.zeros(width, width), torch.zeros(width, width)
    for batch in range(30):
        rows = (torch.randn(128, 256, generator=generator) * scales @ weight).relu()
        factor = 0.95 * factor + 0.05 * (rows.T @ rows / 128)
        if batch == 19:
            before = factor.clone()
    seconds, (values, _) = _seconds(lambda: Whole(width).eigen(factor))
    row: dict[str, object] = {"width": width, "whole_s": round(seconds, 2)}
    for rank in (64, 256):
        side = LowRank(width, rank)
        cold, (found, _) = _seconds(lambda side=side: side.eigen(factor))
        last = side.eigen(before)[1]
        warm, (from_last, _) = _seconds(lambda side=side, last=last: side.eigen(factor, last))
        best = values[-rank:].sum()
        row[f"rank_{rank}"] = {
            "cold_s": round(cold, 2),
            "warm_s": round(warm, 2),
            "share_of_trace": round(float(best / values.sum()), 4),
            "missed_cold": float(f"{1 - found[:-1].sum() / best:.2g}"),
            "missed_warm": float(f"{1 - from_last[:-1].sum() / best:.2g}"),
        }
    print(row, flush=True)
    return row


def _seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = function()
    return time.process_time() - begin, result


# -- quality ----------------------------------------------------------------------------------------


class OneSided(Diagonal):
    """The identity times the mean of the diagonal: the other side alone is preconditioned."""

    def gram(self, rows: Tensor) -> Tensor:
        return rows.square().sum(-1).mean().expand(rows.shape[-2]).clone()


FORMS: dict[str, Callable[[int], Side]] = {
    "whole": Whole,
    "blocks of 256": lambda width: Blocks(width, 256),
    "blocks of 64": lambda width: Blocks(width, 64),
    "blocks of 16": lambda width: Blocks(width, 16),
    "256 eigenpairs": lambda width: LowRank(width, 256),
    "64 eigenpairs": lambda width: LowRank(width, 64),
    "16 eigenpairs": lambda width: LowRank(width, 16),
    "diagonal": Diagonal,
    "one-sided": OneSided,
}


def _digits() -> tuple[Tensor, Tensor]:
    data = sklearn.datasets.load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def _words() -> tuple[Tensor, Tensor]:
    """Four words and the next one."""
    folder = Path(sklearn.datasets.__file__).parent / "descr"
    text = " ".join(path.read_text().lower() for path in sorted(folder.glob("*.rst")))
    words = re.findall(r"[a-z]+|[^\sa-z]", text)
    index = {word: place for place, word in enumerate(dict.fromkeys(words))}
    ids = torch.tensor([index[word] for word in words])
    return torch.stack([ids[i : len(ids) - 4 + i] for i in range(4)], 1), ids[4:]


def _features() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _language() -> nn.Module:
    vocabulary = int(_words()[1].max()) + 1
    return nn.Sequential(
        nn.Embedding(vocabulary, 32),
        nn.Flatten(),
        nn.Linear(128, 128),
        nn.Tanh(),
        nn.Linear(128, vocabulary),
    )


PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], int]] = {
    "digits, fc with 1024 inputs": (_features, _digits, 50),
    "next word, head with 2000 outputs": (_language, _words, 60),
}


def _quality(name: str, seeds: int) -> dict[str, object]:
    make_model, make_data, steps = PROBLEMS[name]
    x, y = make_data()

    def loss(form: str | None, damping: float, seed: int, lr: float) -> float:
        torch.manual_seed(seed)
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        kfac = None
        if form is not None:

            def bounded(width: int, *_: object, **__: object) -> Side:
                return Whole(width) if width < 1000 else FORMS[form](width)

            with mock.patch.object(kronecker, "bounded", bounded):
                kfac = KFAC(
                    model,
                    lr=optimizer,
                    damping=damping,
                    loss_reduction="mean",
                    factor_update_steps=2,
                    inverse_update_steps=20,
                )
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            batch = torch.randint(len(x), (128,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            if kfac is not None:
                kfac.step()
            optimizer.step()
        with torch.no_grad():
            return F.cross_entropy(model(x), y).item()

    row: dict[str, object] = {"problem": name, "steps": steps, "seeds": seeds}
    rates = {lr: [loss(None, 0.0, seed, lr) for seed in range(seeds)] for lr in (0.1, 0.3)}
    row["sgd"] = round(min(statistics.median(losses) for losses in rates.values()), 4)
    for form in FORMS:
        by_damping = {
            damping: statistics.median(loss(form, damping, seed, 0.1) for seed in range(seeds))
            for damping in DAMPINGS
        }
        best = min(by_damping, key=lambda damping: by_damping[damping])
        row[form] = {
            "loss": round(by_damping[best], 4),
            "damping": best,
            "loss_by_damping": {str(key): round(value, 4) for key, value in by_damping.items()},
        }
        print(name, form, row[form], flush=True)
    return row


if __name__ == "__main__":
    main()
