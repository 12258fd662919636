"""What equal bits cost: the reproducible mode beside ordinary steps, in one run of gloo processes.

    python benchmarks/reproducible_cost.py [--ranks 2] [--rounds 6] [--out FILE]

Three trainers take turns, step by step, so that a noisy machine hits them alike: the reproducible
mode, the same micro-batches with a plain all-reduce, and the default mode with one pass per rank.
What counts are the ratios of the fastest and of the median step times of rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from in_place_gaps import RandomDataset

from elastic_kfac import __version__
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import parse_config
from elastic_kfac.data.dataset import Datasets
from elastic_kfac.state.identity import machine_type
from elastic_kfac.training.rank import RankTrainer

BATCH = 128
SHARDS = 8
DEFAULT_OUT = Path(__file__).with_name("results") / "reproducible_cost.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_measure, (arguments.ranks, arguments.rounds, folder), arguments.ranks)
        times: dict[str, list[float]] = json.loads((Path(folder) / "times.json").read_text())
    ours = times["reproducible"]
    result = {
        "benchmark": "reproducible_cost",
        "what": "step seconds of rank 0; ratios of the reproducible mode to the others",
        "model": f"resnet20, {BATCH} x 3x32x32, K-FAC 5/10, {SHARDS} shards, one thread a rank",
        "ranks": arguments.ranks,
        "seconds": {n: {"min": min(t), "median": statistics.median(t)} for n, t in times.items()},
        "ratios": {
            name: {
                "min": round(min(ours) / min(t), 3),
                "median": round(statistics.median(ours) / statistics.median(t), 3),
            }
            for name, t in times.items()
            if name != "reproducible"
        },
        "load_average": os.getloadavg()[0],
        "machine": {"cpu": machine_type(torch.device("cpu")), "cores": os.cpu_count()},
        "versions": {"elastic_kfac": __version__, "torch": torch.__version__},
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["ratios"], indent=1))


def _measure(rank: int, ranks: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    modes: dict[str, tuple[dict[str, Any], int | None]] = {
        "reproducible": ({"reproducible": True}, None),
        "same_micro_batches": ({}, BATCH // SHARDS),
        "default": ({}, None),
    }
    trainers = {
        name: RankTrainer(
            parse_config(
                {
                    "model": {"name": "resnet20"},
                    "train": {"global_batch_size": BATCH, "micro_batch_size": micro},
                    "kfac": {"factor_update_steps": 5, "inverse_update_steps": 10},
                    "elastic": {"logical_shards": SHARDS, **elastic},
                }
            ),
            Communicator.world(),
            Datasets(RandomDataset(), None),
        )
        for name, (elastic, micro) in modes.items()
    }
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for index in range(rounds + 1):
        for name, trainer in trainers.items():
            dist.barrier()
            begin = time.perf_counter()
            trainer.step()
            if index:  # the first step decomposes everything and fills caches
                times[name].append(time.perf_counter() - begin)
    if rank == 0:
        (Path(folder) / "times.json").write_text(json.dumps(times))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
