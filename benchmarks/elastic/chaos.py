"""A run under faults at a steady rate, held against the same run left in peace.

In the reproducible mode the final state of both must have the same bits, every sample must count exactly
once, and the goodput is the part of the time in which the run was not down or computing steps again.

    python benchmarks/elastic/chaos.py [--epochs 1500] [--every 120] [--out benchmarks/results/chaos.json]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from elastic_kfac.cli.entry import main as elastic_kfac
from elastic_kfac.cluster.local_cluster import LocalCluster
from elastic_kfac.cluster.progress import SilentDisplay
from elastic_kfac.cluster.ray_adapter import quiet_driver
from elastic_kfac.cluster.recorder import RunView
from elastic_kfac.cluster.result import RunResult
from elastic_kfac.cluster.trainer import train
from elastic_kfac.config import Config, parse_config
from elastic_kfac.training.audit import audit_run
from elastic_kfac.training.run_folder import RunFolder

NODES = 2


class Chaos(SilentDisplay):
    """Every so many seconds a fault, whatever the run is doing; a node that went comes back next."""

    def __init__(self, cluster: LocalCluster, every_s: float, seed: int) -> None:
        self._cluster, self._every_s = cluster, every_s
        self._random = random.Random(seed)
        self._next: float | None = None
        self.faults: list[str] = []

    def update(self, view: RunView) -> None:
        now = time.monotonic()
        if view.phase == "ended" or not view.progress:
            return
        if self._next is None:
            self._next = now + self._every_s
        if now < self._next:
            return
        self._next += self._every_s
        self.faults.append(self._strike(view))

    def _strike(self, view: RunView) -> str:
        if len(self._cluster.nodes) < NODES:
            self._cluster.add_node()
            return "node returns"
        kind = self._random.choice(["kill", "node lost", "drain long", "drain short"])
        if kind == "kill" and not view.pids:
            kind = "node lost"
        if kind == "kill":
            rank = self._random.choice(sorted(view.pids))
            try:
                self._cluster.kill_worker(view.pids[rank])
            except Exception as error:
                return f"kill of rank {rank} came too late ({type(error).__name__})"
            return f"kill rank {rank}"
        node = self._random.choice(self._cluster.nodes)
        if kind.startswith("drain"):
            self._cluster.drain_node(node, deadline_s=1 if kind == "drain short" else 600)
            if kind == "drain long":
                # Long enough for the hand-over; the machine goes afterwards.
                deadline = time.monotonic() + 15
                while time.monotonic() < deadline:
                    time.sleep(0.5)
        self._cluster.remove_node(node)
        return kind


def go(
    folder: Path, config: Config, *, every_s: float | None, seed: int
) -> tuple[RunResult, list[str], float]:
    """One run; without `every_s` a quiet one."""
    with quiet_driver(), LocalCluster(NODES) as cluster:
        cluster.connect()
        chaos = Chaos(cluster, every_s, seed) if every_s is not None else None
        begin = time.monotonic()
        result = train(
            config,
            name="run",
            storage=str(folder),
            cluster=cluster,
            progress=chaos or SilentDisplay(),
        )
        return result, chaos.faults if chaos else [], time.monotonic() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=1500, help="of 45 steps each")
    parser.add_argument("--every", type=float, default=120.0, help="seconds between faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in-place", action="store_true")
    default = Path(__file__).parents[1] / "results" / "chaos.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="ek-chaos-") as name:
        folder = Path(name)
        elastic_kfac(["shards", "make", "--source", "digits", "--out", f"{name}/digits"])
        config = parse_config(
            {
                "data": {"shards": f"{name}/digits"},
                "train": {
                    "epochs": arguments.epochs,
                    "global_batch_size": 32,
                    "eval_every_epochs": 50,
                },
                "optimizer": {"lr": 0.02},
                "kfac": {"damping": 1e-2, "kl_clip": 1e-4, "inverse_update_steps": 20},
                "elastic": {
                    "max_workers": NODES,
                    "snapshot_interval_s": 0.5,
                    "reproducible": True,
                    "in_place": arguments.in_place,
                },
            }
        )
        load = os.getloadavg()[0]
        struck, faults, wall_s = go(
            folder / "chaos", config, every_s=arguments.every, seed=arguments.seed
        )
        quiet, _, quiet_wall_s = go(folder / "quiet", config, every_s=None, seed=0)
        audit = audit_run(RunFolder(folder / "chaos" / "run"))
        values, reference = struck.values, quiet.values
        step_s = values["train_time_s"] / max(1, values["steps"])
        lost_s = values["downtime_s"] + values["steps_redone"] * step_s
        report: dict[str, Any] = {
            "machine": {"cpus": os.cpu_count(), "load_at_start": round(load, 1)},
            "ray": ray.__version__,
            "in_place": arguments.in_place,
            "seed": arguments.seed,
            "fault_every_s": arguments.every,
            "faults": faults,
            "steps": values["steps"],
            "wall_s": round(wall_s, 1),
            "quiet_wall_s": round(quiet_wall_s, 1),
            "downtime_s": values["downtime_s"],
            "steps_redone": values["steps_redone"],
            "goodput": round(1 - lost_s / wall_s, 4),
            "hash_equals_quiet_run": values["final_state_sha256"]
            == reference["final_state_sha256"],
            "ledger_problems": list(audit.problems),
            "world_sizes": values["world_sizes"],
        }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0 if report["hash_equals_quiet_run"] and not report["ledger_problems"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
