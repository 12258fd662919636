"""A worker at half speed: how soon it is named, and what shares that follow it give back.

    python benchmarks/elastic/slow_rank.py [--steps 80] [--sample-ms 30] [--out FILE]

Gloo processes train digits with K-FAC. A sample takes every rank `--sample-ms` asleep, as on a
device that computes while its processor waits, and twice as long on one rank from step `ONSET` on:
so processes that share cores do not slow each other down, and the ideal is known. It is every rank
busy all the time: of W ranks of which one runs at half speed, (W − ½)/W of the full rate. Steps are
timed between commits of rank 0: those before the onset for the full rate, those after the change of
shares.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor, nn

from elastic_kfac import __version__
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import parse_config
from elastic_kfac.data.dataset import open_datasets
from elastic_kfac.data.shards import make_shards
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.training.callbacks import Callback, KeepGoing, Point
from elastic_kfac.training.loop import run_rank

BATCH = 60
ONSET = 20
SLOW = 1
MODES: dict[str, dict[str, Any]] = {
    "as it is": {"rebalance": False},
    "shares follow": {"rebalance": True},
    "shares follow, reproducible": {
        "rebalance": True,
        "reproducible": True,
        "logical_shards": 32,
    },
}
WANTED = {"steps_to_name": 20, "of_ideal": 0.9}

_sample_s = 0.0
_slow_from: float = float("inf")
_step = 0


class Busy(nn.Module):
    """Takes the time of a device for each sample."""

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            factor = 2.0 if _step >= _slow_from else 1.0
            time.sleep(_sample_s * factor * len(inputs))
        return inputs


def busy_net(num_classes: int, image_shape: tuple[int, int, int], **_: Any) -> nn.Module:
    """A small network on such a device."""
    channels, *sides = image_shape
    return nn.Sequential(
        Busy(),
        nn.Flatten(),
        nn.Linear(channels * sides[0] * sides[1], 32),
        nn.Tanh(),
        nn.Linear(32, num_classes),
    )


class Watch(Callback):
    """When steps were committed, and what was said about ranks."""

    def __init__(self, slow_from: float, sample_s: float) -> None:
        global _slow_from, _sample_s
        _slow_from, _sample_s = slow_from, sample_s
        self.commits: list[tuple[int, float]] = []
        self.events: list[dict[str, Any]] = []

    def on_point(self, point: Point, step: int) -> None:
        global _step
        _step = step
        if point == "committed":
            self.commits.append((step, time.monotonic()))

    def on_event(self, row: Mapping[str, Any]) -> None:
        if row["kind"] in ("slow_rank", "rank_recovered"):
            self.events.append(dict(row))


def rank(
    number: int, ranks: int, port: int, folder: str, mode: str, steps: int, sample_s: float
) -> None:
    """Body of a process; rank 0 writes what it saw."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, False)
    dist.init_process_group("gloo", store=store, rank=number, world_size=ranks)
    config = parse_config(
        {
            "data": {"shards": f"{folder}/digits"},
            "model": {"name": f"{Path(__file__).stem}:busy_net"},
            "train": {
                "global_batch_size": BATCH,
                "epochs": 1000,
                "eval_every_epochs": 1000,
                "torch_threads": 1,
            },
            "optimizer": {"lr": 0.02},
            "kfac": {"inverse_update_steps": 20},
            "elastic": {"max_workers": ranks, **MODES[mode]},
        }
    )
    # The module that the model's name leads to: spawned processes know this one by another name, too.
    module = importlib.import_module(Path(__file__).stem)
    watch = module.Watch(ONSET if number == SLOW else float("inf"), sample_s)
    datasets = open_datasets(config)
    config = config.model_copy(
        update={
            "train": config.train.model_copy(
                update={"epochs": steps * BATCH / datasets.train.num_samples}
            )
        }
    )
    outcome = run_rank(
        config,
        Communicator.world(),
        store=CheckpointStore(f"{folder}/{mode}"),
        callback=watch,
        control=KeepGoing(),
        datasets=datasets,
    )
    if number == 0:
        seen = {
            "commits": watch.commits,
            "events": watch.events,
            "sha256": outcome.state_sha256,
        }
        Path(folder, f"{mode}.json").write_text(json.dumps(seen))


def run(folder: Path, ranks: int, mode: str, steps: int, sample_s: float) -> dict[str, Any]:
    """One mode on fresh processes."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = (ranks, store.port, str(folder), mode, steps, sample_s)
    processes.spawn(rank, args=arguments, nprocs=ranks)
    seen = json.loads((folder / f"{mode}.json").read_text())
    named = next(row for row in seen["events"] if row["kind"] == "slow_rank")
    commits = {int(step): at for step, at in seen["commits"]}

    def step_s(first: int, last: int) -> float:
        """Median, so of steps without a decomposition."""
        return statistics.median(
            commits[s] - commits[s - 1] for s in range(first, last) if s in commits
        )

    full = step_s(4, ONSET)
    after = step_s(named["step"] + 2, steps + 1)
    ideal = full * ranks / (ranks - 0.5)
    return {
        "named": {key: named[key] for key in ("rank", "factor", "step", "reason")},
        "steps_to_name": named["step"] - ONSET + 1,
        "step_s": {"all at full speed": round(full, 4), "one at half speed": round(after, 4)},
        "of_ideal": round(ideal / after, 3),
        "names": len(seen["events"]),
        "sha256": seen["sha256"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--sample-ms", type=float, default=30.0)
    default = Path(__file__).parents[1] / "results" / "slow_rank.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    load = [round(os.getloadavg()[0], 1)]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ek-slow-") as name:
        make_shards("digits", f"{name}/digits")
        for mode in MODES:
            results[mode] = run(
                Path(name), arguments.ranks, mode, arguments.steps, arguments.sample_ms / 1e3
            )
            follows = MODES[mode]["rebalance"]
            met = {"steps_to_name": results[mode]["steps_to_name"] <= WANTED["steps_to_name"]}
            if follows:
                met["of_ideal"] = results[mode]["of_ideal"] >= WANTED["of_ideal"]
            results[mode]["met"] = met
            print(mode, json.dumps(results[mode]), flush=True)
    load.append(round(os.getloadavg()[0], 1))
    report = {
        "benchmark": "slow_rank",
        "what": "one rank at half speed: steps until it is named, throughput against the ideal",
        "problem": f"digits, K-FAC, batch {BATCH}, {arguments.ranks} gloo ranks; a sample takes "
        f"{arguments.sample_ms:g} ms asleep, twice that on rank {SLOW} from step {ONSET}",
        "steps": arguments.steps,
        "results": results,
        "wanted": WANTED,
        "n": 1,
        "machine": {"cores": os.cpu_count(), "load": load},
        "versions": {
            "python": platform.python_version(),
            "elastic_kfac": __version__,
            "torch": torch.__version__,
        },
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
