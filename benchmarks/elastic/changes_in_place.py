"""What a change of the world costs with `elastic.in_place`, under Ray Train on this machine.

    python benchmarks/elastic/changes_in_place.py [--cycles 30] [--out FILE]

In every cycle a node comes, a node is drained, a worker is killed, and a node is lost; each change waits
until the world before has taken some steps. A gap is the time between the last step before the change and
the first one after it; `from_act_s` counts from the kill, the loss or the drain, as the driver saw it, to
that first step.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from elastic_kfac.cli.entry import main as elastic_kfac
from elastic_kfac.cluster.ray.connection import quiet_driver
from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.run.coordinator import RunView
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.cluster.run.trainer import train
from elastic_kfac.config import parse_config
from elastic_kfac.runs.audit import audit_run
from elastic_kfac.state.run_folder import RunFolder

STEPS = 30
"""Steps that a world takes before the next change."""
KINDS = ("grow", "drain", "kill", "return", "node lost", "node back")
"""The changes of a cycle and the size of the world after each: 3, 2, 1, 2, 1, 2."""
SIZES = (3, 2, 1, 2, 1, 2)
TARGETS = {"p50_s": 0.5, "p99_s": 1.0}


class Changes(Display):
    """Changes the cluster again and again; then presses Ctrl-C."""

    def __init__(self, cluster: LocalCluster, cycles: int) -> None:
        self._cluster, self._left = cluster, cycles * len(KINDS)
        self._since: tuple[int, int] = (0, 0)
        self._done = 0
        self._drained: int | None = None
        self.acted: list[float | None] = []
        """When each change was caused; None where it follows from the one before."""

    def update(self, view: RunView) -> None:
        step = int(view.progress.get("step", 0))
        if len(view.world_sizes) != self._since[0]:
            self._since = (len(view.world_sizes), step)
        # World 1 is the start; change n leads from world n to world n + 1.
        is_due = self._since[0] == self._done + 1 and step >= self._since[1] + STEPS
        if not is_due or len(view.pids) != view.world_sizes[-1]:
            return
        if self._done == self._left:
            self._done += 1
            threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        elif self._done < self._left:
            kind = KINDS[self._done % len(KINDS)]
            self._done += 1
            self.acted.append(self._act(kind, view))
            if kind == "kill":
                # Its replacement comes of itself.
                self._done += 1
                self.acted.append(None)

    def _act(self, kind: str, view: RunView) -> float | None:
        last = max(view.pids)
        if kind in ("grow", "node back"):
            self._cluster.add_node(wait=False)
            return None
        if self._drained is not None:
            self._cluster.remove_node(self._drained)
            self._drained = None
        began = time.time()
        if kind == "kill":
            self._cluster.kill_worker(view.pids[last])
        elif kind == "drain":
            self._drained = self._index(view.rank_nodes[last])
            sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
            from support.preemption import drain_node

            drain_node(self._cluster, self._drained, deadline_s=600)
        else:
            self._cluster.remove_node(self._index(view.rank_nodes[last]))
        return began

    def _index(self, node_id: str) -> int:
        return next(i for i in self._cluster.nodes if self._cluster.node_id(i) == node_id)


def summary(values: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(values)
    return {
        "p50_s": round(statistics.median(ordered), 3),
        "p99_s": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
        "min_s": round(ordered[0], 3),
        "n": len(ordered),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cycles", type=int, default=30)
    default = Path(__file__).parents[1] / "results" / "changes_in_place.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    load = [round(os.getloadavg()[0], 1)]
    with tempfile.TemporaryDirectory(prefix="ek-changes-") as name:
        elastic_kfac(["shards", "make", "--source", "digits", "--out", f"{name}/digits"])
        config = parse_config(
            {
                "data": {"shards": f"{name}/digits"},
                "train": {"epochs": 100_000, "global_batch_size": 32, "eval_every_epochs": 500},
                "optimizer": {"lr": 0.02},
                "kfac": {"damping": 1e-2, "kl_clip": 1e-4, "inverse_update_steps": 20},
                "elastic": {"max_workers": 3, "snapshot_interval_s": 0.5, "in_place": True},
            }
        )
        with quiet_driver(), LocalCluster(2) as cluster:
            cluster.connect()
            changes = Changes(cluster, arguments.cycles)
            train(config, name="run", storage=name, cluster=cluster, progress=changes)
        folder = RunFolder(f"{name}/run")
        events = folder.events()
        rows = [row for row in events if row["kind"] in ("resize", "recovery")]
        problems = list(audit_run(folder).problems)
    load.append(round(os.getloadavg()[0], 1))
    results: dict[str, Any] = {}
    for index, kind in enumerate(KINDS):
        mine = rows[index :: len(KINDS)]
        acted = changes.acted[index :: len(KINDS)]
        assert all(row["to_world_size"] == SIZES[index] for row in mine), kind
        results[kind] = {
            "gap": summary([row["downtime_s"] for row in mine]),
            "steps_redone": sum(row["steps_redone"] for row in mine),
        }
        since = [row["time"] - at for row, at in zip(mine, acted, strict=False) if at is not None]
        if since:
            results[kind]["from_act"] = summary(since)
        of = results[kind].get("from_act", results[kind]["gap"])
        results[kind]["met"] = {what: of[what] <= most for what, most in TARGETS.items()}
        print(kind, json.dumps(results[kind]), flush=True)
    report = {
        "what": "s without a step at changes in place under Ray Train; digits, K-FAC, worlds of 1 to 3",
        "results": results,
        "fallbacks": sum(row["kind"] == "fallback" for row in events),
        "ledger_problems": problems,
        "targets": TARGETS,
        "machine": {"cores": os.cpu_count(), "load": load},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "ray": ray.__version__,
        },
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if not problems and not report["fallbacks"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
