"""CPU time that K-FAC adds to a training step: ours, kfac-pytorch's, and that of the bare kernels.

    python benchmarks/kfac_step.py [--peer FOLDER] [--cases resnet20 mlp256] [--out FILE]

Process CPU time, one thread, whole inverse-update cycles, the same Linear and Conv2d layers. Variants
take turns of ten steps, so that a noisy machine hits them alike; what counts are the ratios. `floor`
is kfac_floor.py's: the kernels of an exact step and nothing else, where a preconditioner's step would be.
Spikes are p99 over the median of the steps after the first (and, in cycles longer than a turn, after the
first of each turn, which finds another variant's caches), by wall clock and by CPU time of the training
thread; decompositions on another thread are part of the former and of the process's time. `--peer` is a
folder with kfac-pytorch installed (`pip install --no-deps --target FOLDER` of a checkout of
gpauloski/kfac-pytorch); without it only our own time is measured.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kfac_floor import Floor
from machine import cpu_name
from torch import Tensor, nn
from transformer import Block

from elastic_kfac import KFAC, __version__
from elastic_kfac.tasks.models import create_model

INTERVALS = ((1, 10), (5, 10), (10, 100))
LR = 1e-6
"""Of SGD behind all variants: the weights hardly move. A model that knows its only batch by heart has
denormal gradients, which take several times as long to multiply."""
TURN = 10
"""Steps that a variant takes before it is another's turn."""


def main() -> None:
    cases = _cases()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="folder with kfac-pytorch installed")
    parser.add_argument("--peer-commit", default="unknown", help="its commit, for the record")
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    peer = _import_peer(arguments.peer)
    rows = []
    for name in arguments.cases:
        for at in range(len(INTERVALS)):
            for method in ("eigen", "inverse"):
                rows.append(_compare(name, cases[name], at, method, peer))
                print(_line(rows[-1]), flush=True)
                if arguments.out:
                    result = _result(rows, arguments, cases, peer)
                    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _result(
    rows: list[dict[str, Any]], arguments: argparse.Namespace, cases: Mapping[str, Case], peer: Any
) -> dict[str, Any]:
    return {
        "benchmark": "kfac_step",
        "what": "process CPU ms per step, float32, one thread; extra = K-FAC minus SGD; "
        "extra_ratio = our extra / peer's extra; floor = SGD and the bare kernels; floor_ratio = its "
        "extra / peer's extra; p99 = p99 / median of a step's time, by wall clock and by CPU time of "
        "the training thread",
        "cases": {name: cases[name].description for name in arguments.cases},
        "rows": rows,
        "peer": {"name": "kfac-pytorch", "commit": arguments.peer_commit} if peer else None,
        "machine": {"cpu": cpu_name(), "cores": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "elastic_kfac": __version__,
        },
    }


def _import_peer(folder: Path | None) -> Any:
    if folder:
        sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("kfac.preconditioner").KFACPreconditioner
    except ImportError:
        print("kfac-pytorch is not importable here: measuring ours against SGD only")
        return None


@dataclass(frozen=True)
class Case:
    """A model with the batch that it trains on."""

    description: str
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Tensor]
    cycles: tuple[int, int, int]
    """Measured cycles at each pair of `INTERVALS`."""
    options: Mapping[str, Any] = field(default_factory=dict)


def _cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def labels(count: int) -> Tensor:
        return torch.randint(10, (count,), generator=generator)

    def classify(x: Tensor, y: Tensor) -> Callable[[nn.Module], Tensor]:
        return lambda model: F.cross_entropy(model(x), y)

    images, image_labels = normal(64, 3, 32, 32), labels(64)
    rows, row_labels = normal(128, 784), labels(128)
    tokens, targets = normal(16, 128, 256), normal(16, 128, 256)
    return {
        "resnet20": Case(
            "ResNet-20, 64 x 3 x 32 x 32",
            lambda: create_model("resnet20", 10, (3, 32, 32)),
            classify(images, image_labels),
            (3, 3, 1),
        ),
        "mlp256": Case(
            "MLP 784-256x4-10, 128 rows",
            lambda: _mlp(784, [256] * 4, 10),
            classify(rows, row_labels),
            (20, 20, 3),
        ),
        "mlp1024": Case(
            "MLP 784-1024x3-10, 128 rows",
            lambda: _mlp(784, [1024] * 3, 10),
            classify(rows, row_labels),
            (3, 3, 1),
        ),
        "encoder": Case(
            "transformer encoder block, width 256, 16 x 128 tokens",
            lambda: Block(256, 8, causal=False),
            lambda model: F.mse_loss(model(tokens), targets),
            (4, 4, 1),
            {"loss_reduction": "positions"},
        ),
    }


def _mlp(inputs: int, widths: list[int], outputs: int) -> nn.Module:
    sizes = [inputs, *widths]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def _compare(name: str, case: Case, at: int, method: str, peer: Any) -> dict[str, Any]:
    factor_steps, inverse_steps = INTERVALS[at]
    base = case.build()
    norms = (nn.BatchNorm2d, nn.LayerNorm)
    skip = [n for n, m in base.named_modules() if isinstance(m, norms)]
    common = {"lr": 0.1, "damping": 0.01, "factor_update_steps": factor_steps}
    builders: dict[str, Callable[[nn.Module], Any]] = {
        "sgd": lambda model: None,
        "ours": lambda model: KFAC(
            model,
            inverse_update_steps=inverse_steps,
            method=method,
            skip_layers=["^" + n.replace(".", r"\.") + "$" for n in skip],
            kl_clip=1e-3,
            **common,
            **case.options,
        ),
    }
    if peer is not None:
        builders["peer"] = lambda model: peer(
            model, inv_update_steps=inverse_steps, compute_method=method, **common
        )
    builders["floor"] = lambda model: Floor(
        model,
        case.loss,
        method=method,
        skip=skip,
        factor_update_steps=factor_steps,
        inverse_update_steps=inverse_steps,
    )
    runners = {n: _Runner(copy.deepcopy(base), build, case.loss) for n, build in builders.items()}
    times: dict[str, list[float]] = {n: [] for n in runners}
    for number in range(case.cycles[at] + 1):
        seconds = dict.fromkeys(runners, 0.0)
        for _ in range(0, inverse_steps, TURN):
            for n, runner in runners.items():
                seconds[n] += runner.run(TURN)
        if number:  # the first one warms up, and every later cycle starts at the same phase
            for n in runners:
                times[n].append(seconds[n])
    per_step = {n: 1e3 * statistics.median(t) / inverse_steps for n, t in times.items()}
    extra = {n: per_step[n] - per_step["sgd"] for n in builders}
    row: dict[str, Any] = {
        "case": name,
        "factor_update_steps": factor_steps,
        "inverse_update_steps": inverse_steps,
        "method": method,
        "n": case.cycles[at],
        **{f"{n}_ms": round(value, 2) for n, value in per_step.items()},
        "ours_over_sgd": round(per_step["ours"] / per_step["sgd"], 3),
        "ours_over_floor": round(extra["ours"] / extra["floor"], 3),
        "p99": {n: runner.spikes(inverse_steps) for n, runner in runners.items() if n != "floor"},
    }
    if "peer" in per_step:
        row["peer_over_sgd"] = round(per_step["peer"] / per_step["sgd"], 3)
        row["extra_ratio"] = round(extra["ours"] / extra["peer"], 3)
        row["floor_ratio"] = round(extra["floor"] / extra["peer"], 3)
    return row


class _Runner:
    """One model with one preconditioner."""

    def __init__(
        self,
        model: nn.Module,
        build: Callable[[nn.Module], Any],
        loss: Callable[[nn.Module], Tensor],
    ) -> None:
        self.model, self.loss = model, loss
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.preconditioner = build(model)
        self.turns: list[int] = []
        """The first step of each."""
        self.steps: list[tuple[float, float]] = []
        """Seconds of each step: wall clock, CPU time of this thread."""

    def run(self, steps: int) -> float:
        """Process CPU seconds of so many steps, and of what they have begun on another thread."""
        self.turns.append(len(self.steps))
        start = time.process_time()
        for _ in range(steps):
            begin = time.perf_counter(), time.thread_time()
            self.optimizer.zero_grad()
            self.loss(self.model).backward()
            if self.preconditioner is not None:
                self.preconditioner.step()
            self.optimizer.step()
            self.steps.append((time.perf_counter() - begin[0], time.thread_time() - begin[1]))
        if isinstance(self.preconditioner, KFAC):
            wait(job.parts for job in self.preconditioner.refresh.ahead._jobs.values())
        return time.process_time() - start

    def spikes(self, cycle: int) -> dict[str, float]:
        """p99 / median of the steps after the first, which decomposes everything; where cycles are longer
        than turns, without the first ones of turns, which find another variant's caches."""
        cold = set(self.turns if cycle > TURN else ())
        steps = [step for at, step in enumerate(self.steps) if at and at not in cold]
        found = {}
        for name, values in zip(("wall", "thread"), zip(*steps, strict=True), strict=True):
            ordered = sorted(values)
            p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
            found[name] = round(p99 / statistics.median(ordered), 2)
            found[f"{name}_largest"] = round(ordered[-1] / statistics.median(ordered), 2)
        return {**found, "n": len(steps)}


def _line(row: dict[str, Any]) -> str:
    text = (
        f"{row['case']:9s} ({row['factor_update_steps']},{row['inverse_update_steps']}) "
        f"{row['method']:8s} sgd {row['sgd_ms']:7.1f} ms  ours {row['ours_ms']:7.1f} ms "
        f"({row['ours_over_sgd']:.2f}x SGD, extra {row['ours_over_floor']:.2f}x the floor)"
    )
    if "peer_ms" in row:
        text += (
            f"  kfac-pytorch {row['peer_ms']:7.1f} ms ({row['peer_over_sgd']:.2f}x)"
            f"  our extra / its extra {row['extra_ratio']:.2f}"
        )
    spikes = "  ".join(f"{n} {p['wall']:.2f} ({p['thread']:.2f})" for n, p in row["p99"].items())
    return text + f"  p99/median {spikes}  n={row['n']}"


if __name__ == "__main__":
    main()
