"""CPU time that K-FAC adds to a training step: ours beside kfac-pytorch, in one run.

    python benchmarks/kfac_step.py [--peer FOLDER] [--out FILE]

Process CPU time, one thread, whole inverse-update cycles, the same layers (convolutions and the last
Linear), ResNet-20 on 32x32 images, batch 64. The three variants take turns, cycle by cycle, so that a
noisy machine hits them alike; what counts are the ratios. `--peer` is a folder with
kfac-pytorch installed (`pip install --no-deps --target FOLDER` of a checkout of gpauloski/kfac-pytorch);
without it only our own time over SGD is measured.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from elastic_kfac import KFAC, __version__
from elastic_kfac.tasks.models import create_model

INTERVALS = ((1, 10), (10, 100))
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="folder with kfac-pytorch installed")
    parser.add_argument("--peer-commit", default="unknown", help="its commit, for the record")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--cycles", type=int, nargs=2, default=(5, 1), help="per interval pair")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    peer = _import_peer(arguments.peer)
    rows = []
    for intervals, cycles in zip(INTERVALS, arguments.cycles, strict=True):
        for method in ("eigen", "inverse"):
            rows.append(_compare(intervals, method, cycles, peer))
            print(_line(rows[-1]), flush=True)
    result = {
        "benchmark": "kfac_step",
        "what": "process CPU ms per step; extra = K-FAC minus SGD; ratio = our extra / peer's extra",
        "model": "resnet20, batch 64, 3x32x32, float32, one thread",
        "rows": rows,
        "peer": {"name": "kfac-pytorch", "commit": arguments.peer_commit} if peer else None,
        "machine": {"cpu": _cpu(), "cores": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "elastic_kfac": __version__,
        },
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _import_peer(folder: Path | None) -> object | None:
    if folder:
        sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("kfac.preconditioner").KFACPreconditioner
    except ImportError:
        print("kfac-pytorch is not importable here: measuring ours against SGD only")
        return None


def _compare(intervals: tuple[int, int], method: str, cycles: int, peer: object | None) -> dict:
    base = create_model("resnet20", num_classes=10, image_shape=(3, 32, 32))
    norms = [n for n, m in base.named_modules() if isinstance(m, nn.BatchNorm2d)]
    skip = ["^" + name.replace(".", r"\.") + "$" for name in norms]
    variants: dict[str, Callable[[nn.Module], object | None]] = {
        "sgd": lambda model: None,
        "ours": lambda model: KFAC(
            model,
            lr=0.1,
            damping=0.01,
            factor_update_steps=intervals[0],
            inverse_update_steps=intervals[1],
            method=method,
            skip_layers=skip,
        ),
    }
    if peer is not None:
        variants["peer"] = lambda model: peer(
            model,
            lr=0.1,
            damping=0.01,
            factor_update_steps=intervals[0],
            inv_update_steps=intervals[1],
            compute_method=method,
        )
    runners = {name: _Runner(copy.deepcopy(base), build) for name, build in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():
        runner.cycle(intervals[1])  # warm-up, and every later cycle starts at the same phase
    for _ in range(cycles):
        for name, runner in runners.items():
            times[name].append(runner.cycle(intervals[1]))
    per_step = {name: 1e3 * statistics.median(t) / intervals[1] for name, t in times.items()}
    row: dict[str, object] = {
        "factor_update_steps": intervals[0],
        "inverse_update_steps": intervals[1],
        "method": method,
        "n": cycles,
        **{f"{name}_ms": round(value, 2) for name, value in per_step.items()},
        "ours_over_sgd": round(per_step["ours"] / per_step["sgd"], 3),
    }
    if "peer" in per_step:
        row["peer_over_sgd"] = round(per_step["peer"] / per_step["sgd"], 3)
        extra = [per_step[name] - per_step["sgd"] for name in ("ours", "peer")]
        row["extra_ratio"] = round(extra[0] / extra[1], 3)
    return row


class _Runner:
    """One model with one preconditioner, on its own random batches."""

    def __init__(self, model: nn.Module, build: Callable[[nn.Module], object | None]) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.preconditioner = build(model)
        self.x = torch.randn(BATCH, 3, 32, 32)
        self.y = torch.randint(10, (BATCH,))

    def cycle(self, steps: int) -> float:
        start = time.process_time()
        for _ in range(steps):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x), self.y).backward()
            if self.preconditioner is not None:
                self.preconditioner.step()
            self.optimizer.step()
        return time.process_time() - start


def _line(row: dict) -> str:
    text = (
        f"({row['factor_update_steps']},{row['inverse_update_steps']}) {row['method']:8s}"
        f" sgd {row['sgd_ms']:7.1f} ms  ours {row['ours_ms']:7.1f} ms ({row['ours_over_sgd']:.2f}x)"
    )
    if "peer_ms" in row:
        text += (
            f"  kfac-pytorch {row['peer_ms']:7.1f} ms ({row['peer_over_sgd']:.2f}x)"
            f"  our extra / its extra {row['extra_ratio']:.2f}"
        )
    return text + f"  n={row['n']}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
