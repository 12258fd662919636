"""What decompositions off the critical path gain: at once, on a thread, in another process.

    python benchmarks/planner/decomposers.py [--out FILE] [--width 1024] [--steps 150]

An MLP 784-W-W-W-10, batch 128, statistics every 5 and decompositions every 50 steps, one thread. Per
step: seconds on the clock, and CPU time of the thread that trains. Where decompositions run beside
training, the clock gains only if a core is free. Parameters are compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC, __version__
from elastic_kfac.kfac.calibration import host_kind

WARM_UP = 50
WAYS: dict[str, dict[str, Any]] = {
    "in the step, all layers at once": {"stagger": False},
    "in the step, layers apart": {"stagger": True},
    "on a thread": {"stagger": True},
    "in another process": {"stagger": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, ends = {}, {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(abs, 1).result()
        for way, options in WAYS.items():
            rows[way], ends[way] = _train(way, options, pool, arguments)
            print(way, json.dumps(rows[way]), flush=True)
    apart = list(WAYS)[1:]
    result = {
        "benchmark": "planner_decomposers",
        "what": f"MLP of width {arguments.width}, intervals (5, 50), {arguments.steps} steps",
        "rows": rows,
        "equal_bits": all(
            torch.equal(one, other)
            for way in apart[1:]
            for one, other in zip(ends[apart[0]], ends[way], strict=True)
        ),
        "load": os.getloadavg()[0],
        "machine": host_kind(),
        "elastic_kfac": __version__,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _train(
    way: str, options: dict[str, Any], pool: Executor, arguments: argparse.Namespace
) -> tuple[dict[str, float], list[Tensor]]:
    torch.manual_seed(0)
    widths = [784, *[arguments.width] * 3, 10]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    kfac = KFAC(model, lr=optimizer, factor_update_steps=5, inverse_update_steps=50, **options)
    if way == "in another process":
        kfac.decompose_in(pool)
    if way == "in the step, layers apart":
        kfac.refresh.ahead.begin = lambda *_: None  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(1)
    wall, own = [], []
    for step in range(WARM_UP + arguments.steps):
        x = torch.randn(128, 784, generator=generator)
        y = torch.randint(10, (128,), generator=generator)
        begin, cpu = time.perf_counter(), time.thread_time()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        kfac.step()
        optimizer.step()
        if step >= WARM_UP:
            wall.append(time.perf_counter() - begin)
            own.append(time.thread_time() - cpu)
    found = {
        "mean_ms": 1e3 * statistics.mean(wall),
        "p99_ms": 1e3 * statistics.quantiles(wall, n=100)[98],
        "own_thread_cpu_ms": 1e3 * statistics.mean(own),
        "own_thread_cpu_p99_ms": 1e3 * statistics.quantiles(own, n=100)[98],
    }
    kfac.close()
    return {name: round(value, 3) for name, value in found.items()}, [*model.parameters()]


if __name__ == "__main__":
    main()
