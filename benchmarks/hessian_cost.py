"""What ABS pays for its eigenvalues on Fashion-MNIST: T_Hess beside T_comp and T_comm of one run.

python benchmarks/hessian_cost.py [--shards data/fashion_mnist] [--epochs 2]
                                  [--out benchmarks/results/hessian_cost.json]

One process, no Ray: the loop's own accounting (`hessian_s`, `computation_s`, `communication_s`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from elastic_kfac import __version__
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import read_config
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.training.callbacks import FolderWriter, KeepGoing
from elastic_kfac.training.loop import run_rank

CONFIG = Path(__file__).parents[1] / "jobs" / "configs" / "fashion_mnist.yaml"
LIMIT = 0.05
CASES: dict[str, tuple[str, ...]] = {
    "power iteration, SGD": ("batch.eigenvalue=power", "kfac.enabled=false"),
    "last layer, SGD": ("batch.eigenvalue=last_layer", "kfac.enabled=false"),
    "power iteration, K-FAC": ("batch.eigenvalue=power",),
}


def measure(shards: str, epochs: float, case: tuple[str, ...]) -> dict[str, Any]:
    config = read_config(
        CONFIG,
        (
            f"data.shards={shards}",
            f"train.epochs={epochs}",
            "train.target_accuracy=null",
            "train.eval_every_epochs=1",
            "optimizer.lr_schedule=constant",
            "batch.policy=abs",
            "batch.max_batch_size=2048",
            *case,
        ),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(name)
        folder.write_config(config)
        outcome = run_rank(
            config,
            Communicator.solo(),
            store=CheckpointStore(folder.uri),
            callback=FolderWriter(folder),
            control=KeepGoing(),
        )
        rows = [row for row in folder.metrics() if "hessian_time_s" in row]
    progress = outcome.progress
    trained = progress.train_time_s
    return {
        "train_time_s": round(trained, 2),
        "computation_s": round(progress.computation_s, 2),
        "communication_s": round(progress.communication_s, 2),
        "hessian_s": round(progress.hessian_s, 3),
        "hessian_share": round(progress.hessian_s / (trained + progress.hessian_s), 5),
        "measurements": len(rows),
        "eigenvalues": [row.get("hessian_eigenvalue") for row in rows],
        "best_accuracy": progress.best_value,
        "steps": progress.step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", default="data/fashion_mnist")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not Path(arguments.shards).is_dir():
        print(f"{arguments.shards} is not there; see jobs/configs/fashion_mnist.yaml")
        return
    torch.set_num_threads(1)
    rows = {}
    for name, case in CASES.items():
        rows[name] = measure(arguments.shards, arguments.epochs, case)
        share = rows[name]["hessian_share"]
        verdict = "within" if share <= LIMIT else "ABOVE"
        print(f"{name:24s} T_Hess {share:.2%} of training: {verdict} {LIMIT:.0%}", flush=True)
    result = {
        "benchmark": "hessian_cost",
        "what": "share of T_Hess in training time, ABS on Fashion-MNIST, one process, one thread",
        "epochs": arguments.epochs,
        "rows": rows,
        "cores": os.cpu_count(),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "elastic_kfac": __version__,
        },
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
