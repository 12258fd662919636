"""A run under faults at a steady rate, held against the same run left in peace.

A fault every 30 s for 30 minutes: a worker killed, a node lost, a node drained with time or cut short. A
node that went is replaced half a period later. Then the run is stopped, started again under its name and
finished. In the reproducible mode its final state must have the bits of a run of as many epochs without
any fault, every sample must count exactly once.

The first minute is quiet. `goodput` is the committed steps times the median step of that minute, over the
wall time. A step takes 0.3 s, on one worker as on two, and a node that starts takes no time from the
others, as on a machine of its own (see `equal_ranks.py`): what is missing from 1 is the price of the
changes. The run in peace that the final state is compared with does not wait.

With `--shared-cores` steps wait 0.1 s beside what they compute (see `paced_ranks.py`), and all nodes
share the cores of this machine. Goodput then is below 1 without any fault (`quiet_goodput`), as steps
that refresh curvature take longer than the median; a single worker computes the whole batch, and the
start of a node takes time from those who train. `time_not_lost` leaves all of that out (see there).

    python benchmarks/elastic/chaos.py [--phases 30:30] [--shared-cores] [--no-in-place] [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
import torch
from equal_ranks import low_priority

from elastic_kfac.cli.entry import main as elastic_kfac
from elastic_kfac.cluster.ray.connection import quiet_driver
from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.run.coordinator import RunView
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.cluster.run.result import CHANGES, RunResult
from elastic_kfac.cluster.run.trainer import train
from elastic_kfac.config import Config, parse_config
from elastic_kfac.runs.audit import audit_run
from elastic_kfac.state.run_folder import RunFolder

NODES = 2
TURMOIL = ("failure", "parked", "preemption", "state_found", "restored")
"""Kinds of events on the way from one world to the next, beside `CHANGES` at its end."""
STEPS_PER_EPOCH = 45
QUIET_S = 60.0
HAND_OVER_S = 90.0
"""How long a node that was drained with time stays at most."""


@dataclass(frozen=True)
class Phase:
    """So many seconds with a fault every so many seconds."""

    seconds: float
    every_s: float

    @classmethod
    def parse(cls, text: str) -> list[Phase]:
        """`minutes:seconds` of every phase, separated by commas."""
        pairs = [part.split(":") for part in text.split(",")]
        return [cls(60 * float(minutes), float(every)) for minutes, every in pairs]


class Chaos(Display):
    """Strikes at its times, whatever the run is doing; presses Ctrl-C after the last phase."""

    def __init__(
        self,
        cluster: LocalCluster,
        phases: Sequence[Phase],
        seed: int,
        starting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._cluster, self._starting = cluster, starting
        self._random = random.Random(seed)
        self._strikes: list[tuple[float, Phase]] = []
        begin = QUIET_S
        for phase in phases:
            count = round(phase.seconds / phase.every_s)
            self._strikes += [(begin + (n + 0.5) * phase.every_s, phase) for n in range(count)]
            begin += phase.seconds
        self._end = begin
        self._return_at: float | None = None
        self._leaving: tuple[int, float] | None = None
        self.began: float | None = None
        self.faults: list[tuple[float, str]] = []
        """Seconds since the first step, and what happened."""

    def update(self, view: RunView) -> None:
        if self.began is None:
            if int(view.progress.get("step", 0)) < 1:
                return
            self.began = time.time()
        now = time.time() - self.began
        self._let_go(view, now)
        if self._return_at is not None and now >= self._return_at and self._leaving is None:
            self._return_at = None
            if len(self._cluster.nodes) < NODES:
                with self._starting():
                    self._cluster.add_node()
        elif self._strikes and now >= self._strikes[0][0]:
            _, phase = self._strikes.pop(0)
            self.faults.append((round(now, 1), self._strike(view, now, phase)))
            print(*self.faults[-1], flush=True)
        elif now >= self._end:
            self._end = float("inf")
            # From another thread, so that the main thread meets it wherever it happens to be.
            threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    def _let_go(self, view: RunView, now: float) -> None:
        """A node that was drained with time goes once the run steps without it."""
        if self._leaving is None:
            return
        node, deadline = self._leaving
        moved = view.state == "running" and self._cluster.node_id(node) not in set(
            view.rank_nodes.values()
        )
        if moved or now > deadline:
            self._cluster.remove_node(node)
            self._leaving = None

    def _strike(self, view: RunView, now: float, phase: Phase) -> str:
        if self._leaving is not None:
            self._cluster.remove_node(self._leaving[0])
            self._leaving = None
            return "drain cut short"
        kind = self._random.choice(["kill", "node lost", "drain long", "drain short"])
        if kind == "kill" and view.pids:
            rank = self._random.choice(sorted(view.pids))
            try:
                self._cluster.kill_worker(view.pids[rank])
            except Exception as error:
                return f"kill of rank {rank} came too late ({type(error).__name__})"
            return f"kill rank {rank}"
        if not self._cluster.nodes:
            return "no node is left to lose"
        self._return_at = now + phase.every_s / 2
        node = self._random.choice(self._cluster.nodes)
        if kind == "drain long":
            _drain(self._cluster, node, deadline_s=600)
            self._leaving = (node, now + HAND_OVER_S)
            return kind
        if kind == "drain short":
            _drain(self._cluster, node, deadline_s=1)
        self._cluster.remove_node(node)
        return "node lost" if kind == "kill" else kind


def _drain(cluster: LocalCluster, node: int, *, deadline_s: float) -> None:
    # The faults of the tests.
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from support.preemption import drain_node

    drain_node(cluster, node, deadline_s=deadline_s)


def go(
    folder: Path, config: Config, display: Display, cluster: LocalCluster, ranks: str | None = None
) -> RunResult:
    """One call of `train`; its steps wait if there is a module of `ranks` that do."""
    options: dict[str, Any] = {"storage": str(folder), "cluster": cluster, "progress": display}
    if ranks is not None:
        options |= {"rank_function": f"{ranks}:run", "member_function": f"{ranks}:member"}
    return train(config, name="run", **options)


def time_not_lost(
    begin: float, end: float, commits: Sequence[float], events: Sequence[float]
) -> float:
    """The share of the time that was not lost to a change of the world.

    Lost is every stretch between two commits in which something happened to the run, but for what a step
    takes (the median): standing still, starting, restoring and computing again, ended or not.
    """
    moments = [begin, *sorted(t for t in commits if begin <= t < end), end]
    gaps = list(itertools.pairwise(moments))
    step_s = statistics.median(after - before for before, after in gaps)
    lost = sum(
        max(0.0, after - before - step_s)
        for before, after in gaps
        if any(before <= moment < after for moment in events)
    )
    return round(1 - lost / (end - begin), 4)


def by_phase(
    folder: RunFolder, chaos: Chaos, phases: Sequence[Phase]
) -> tuple[float, float, list[dict[str, Any]]]:
    """The median step of the quiet minute, s, and its goodput; what became of every phase, a change where
    it ended."""
    assert chaos.began is not None
    events, metrics = folder.events(), [row for row in folder.metrics() if "loss" in row]
    # The metrics know the time since the run's start, the first of them when that was.
    first = next(row["time"] for row in events if row["kind"] == "start")
    committed = [first + row["wall_time_s"] for row in metrics]
    happened = [row["time"] for row in events if row["kind"] in {*CHANGES, *TURMOIL}]
    found, begin = [], chaos.began + QUIET_S
    quiet = [moment for moment in committed if chaos.began <= moment < begin]
    quiet_step_s = statistics.median(b - a for a, b in itertools.pairwise(quiet))
    for phase in phases:
        end = begin + phase.seconds
        changes = [row for row in events if row["kind"] in CHANGES and begin <= row["time"] < end]
        downtimes = [float(row["downtime_s"]) for row in changes]
        moments = [moment for moment in committed if begin <= moment < end]
        struck = [kind for at, kind in chaos.faults if begin <= chaos.began + at < end]
        found.append(
            {
                "fault_every_s": phase.every_s,
                "faults": len(struck),
                "seconds": phase.seconds,
                "steps": len(moments),
                "steps_redone": sum(int(row["steps_redone"]) for row in changes),
                "goodput": round(len(moments) * quiet_step_s / phase.seconds, 4),
                "time_not_lost": time_not_lost(begin, end, moments, happened),
                "changes_of_the_world": len(changes),
                "downtime_s": [round(value, 1) for value in downtimes],
                "in_order": struck,
            }
        )
        begin = end
    return quiet_step_s, len(quiet) * quiet_step_s / QUIET_S, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--phases", default="30:30", help="minutes:seconds between faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--in-place",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="survivors keep their processes",
    )
    parser.add_argument(
        "--shared-cores", action="store_true", help="computing and starting nodes take their time"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    ranks = "paced_ranks" if arguments.shared_cores else "equal_ranks"
    result = "chaos_shared_cores" if arguments.shared_cores else "chaos"
    out = arguments.out or Path(__file__).parents[1] / "results" / f"{result}.json"
    logging.disable(logging.INFO)
    phases = Phase.parse(arguments.phases)
    here = str(Path(__file__).parent)
    paths = os.pathsep.join(path for path in (os.environ.get("PYTHONPATH"), here) if path)
    with (
        tempfile.TemporaryDirectory(prefix="ek-chaos-") as name,
        patch.dict(os.environ, {"PYTHONPATH": paths}),
    ):
        folder = Path(name)
        elastic_kfac(["shards", "make", "--source", "digits", "--out", f"{name}/digits"])

        def config(epochs: int) -> Config:
            return parse_config(
                {
                    "data": {"shards": f"{name}/digits"},
                    "train": {"epochs": epochs, "global_batch_size": 32, "eval_every_epochs": 50},
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

        load = [os.getloadavg()[0]]
        struck = RunFolder(str(folder / "chaos" / "run"))
        with quiet_driver(), LocalCluster(NODES) as cluster:
            cluster.connect()
            starting = nullcontext if arguments.shared_cores else low_priority
            chaos = Chaos(cluster, phases, arguments.seed, starting)
            stopped = go(folder / "chaos", config(100_000), chaos, cluster, ranks)
            load.append(os.getloadavg()[0])
            quiet_step_s, quiet_goodput, measured = by_phase(struck, chaos, phases)
            print(json.dumps(measured, indent=1), flush=True)
            while len(cluster.nodes) < NODES:
                cluster.add_node()
            last = config(stopped.values["steps"] // STEPS_PER_EPOCH + 2)
            values = go(folder / "chaos", last, Display(), cluster).values
            quiet = go(folder / "quiet", last, Display(), cluster).values
        audit = audit_run(struck)
        equal = values["final_state_sha256"] == quiet["final_state_sha256"]
        report: dict[str, Any] = {
            "what": "a run under faults, stopped, continued and finished, against a quiet one",
            "in_place": arguments.in_place,
            "shared_cores": arguments.shared_cores,
            "quiet_step_s": round(quiet_step_s, 4),
            "quiet_goodput": round(quiet_goodput, 4),
            "phases": measured,
            "steps": values["steps"],
            "hash_equals_quiet_run": equal,
            "final_state_sha256": values["final_state_sha256"],
            "samples_committed": values["samples_committed"],
            "ledger_problems": list(audit.problems),
            "world_sizes": values["world_sizes"],
            "seed": arguments.seed,
            "n": 1,
            "hardware": f"{platform.machine()}, {os.cpu_count()} shared cores",
            "load": [round(x, 1) for x in load],
            "versions": {"torch": torch.__version__, "ray": ray.__version__},
        }
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0 if equal and not report["ledger_problems"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
