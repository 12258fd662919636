"""Accuracy and bytes by wire format of the gradients (the communication comparison of the S0 talk).

    python benchmarks/studies/wire_formats.py [--seeds 3] [--out benchmarks/results/wire_formats.json]

Trains the small network on scikit-learn's digits on two gloo processes, K-FAC on, once per format and
seed; int8 and top-k with and without error feedback. Bytes are what each rank hands to collectives for
gradients, counted, not estimated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from elastic_kfac import __version__
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import parse_config
from elastic_kfac.data.shards import make_shards
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.training.callbacks import Callback, KeepGoing
from elastic_kfac.training.loop import run_rank

WORLD_SIZE = 2
FORMATS: tuple[tuple[str, bool | None], ...] = (
    ("fp32", None),
    ("bf16", None),
    ("fp16", None),
    ("int8", True),
    ("int8", False),
    ("topk", True),
    ("topk", False),
)


class _BestAccuracy(Callback):
    """Remembers the last evaluation."""

    def __init__(self) -> None:
        self.accuracy = 0.0

    def on_metrics(self, row: Any) -> None:
        self.accuracy = row.get("eval_accuracy", self.accuracy)


def _config(folder: str, wire: str, feedback: bool | None, seed: int, epochs: int) -> Any:
    return parse_config(
        {
            "data": {"shards": f"{folder}/digits"},
            "train": {"epochs": epochs, "global_batch_size": 128, "seed": seed},
            "optimizer": {"lr": 0.05, "lr_schedule": "cosine"},
            "kfac": {"damping": 0.01, "kl_clip": 1e-4},
            "elastic": {"snapshot_interval_s": 1e6},
            "communication": {
                "wire_format": wire,
                "error_feedback": feedback,
                "topk_ratio": 0.01,
            },
        }
    )


def _rank(rank: int, folder: str, seeds: int, epochs: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=300),
    )
    rows = []
    for wire, feedback in FORMATS:
        accuracies, gradient_bytes, steps = [], 0.0, 0
        for seed in range(seeds):
            communicator = Communicator.world()
            best = _BestAccuracy()
            store = CheckpointStore(f"{folder}/{wire}-{feedback}-{seed}")
            config = _config(folder, wire, feedback, seed, epochs)
            outcome = run_rank(
                config, communicator, store=store, callback=best, control=KeepGoing()
            )
            accuracies.append(best.accuracy)
            gradient_bytes = float(communicator.counters.snapshot()["gradients"].received_bytes)
            steps = outcome.progress.step
        if rank == 0:
            rows.append(
                {
                    "wire_format": wire,
                    "error_feedback": feedback,
                    "accuracy_mean": statistics.mean(accuracies),
                    "accuracy_stdev": statistics.stdev(accuracies) if seeds > 1 else None,
                    "gradient_bytes_per_step": round(gradient_bytes / steps),
                    "steps": steps,
                    "n": seeds,
                }
            )
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        make_shards("digits", f"{folder}/digits")
        mp.spawn(_rank, (folder, arguments.seeds, arguments.epochs), nprocs=WORLD_SIZE)
        rows = json.loads(Path(folder, "rows.json").read_text())
    plain = rows[0]["gradient_bytes_per_step"]
    print(f"{'wire':6s} {'feedback':9s} {'test accuracy':>18s} {'bytes/step':>11s} {'of fp32':>8s}")
    for row in rows:
        feedback = {None: "-", True: "yes", False: "no"}[row["error_feedback"]]
        spread = 100 * (row["accuracy_stdev"] or 0)
        print(
            f"{row['wire_format']:6s} {feedback:9s} {100 * row['accuracy_mean']:10.2f} ± {spread:4.2f} %"
            f" {row['gradient_bytes_per_step']:11,d} {row['gradient_bytes_per_step'] / plain:8.3f}"
        )
    result = {
        "study": "wire_formats",
        "what": "digits, small_cnn, K-FAC, 2 gloo processes; bytes received per rank and step",
        "rows": rows,
        "epochs": arguments.epochs,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__, "elastic_kfac": __version__},
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
