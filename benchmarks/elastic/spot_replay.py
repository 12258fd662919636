"""A trace of spot capacity replayed against the elastic run: how much of the possible work gets done, and
at what price?

    python benchmarks/elastic/spot_replay.py [--trace FILE] [--real-minutes 10] [--out FILE]

The trace has the form of SkyPilot's spot traces: `{"metadata": {"gap_seconds": 60}, "data": [8, 8,
6, ...]}`, nodes that can be had in each gap. The one beside this file is made up (`make_trace`):
nodes live two hours in the mean, a quarter of the losses take others with them, lost nodes come
back after 20 minutes in the mean. Two of three losses have 30 s of notice, as on the larger clouds.

*Virtual*: the whole trace through the real supervisor and the real membership protocol in virtual
time (`virtual_cluster.py`); what hardware takes is from `benchmarks/results`: starting a worker
(`start_up`), and the gaps at changes (`changes_in_place`), which are charged on top of the
protocol's own time.

*Plain Ray Train* is a model, not a run: its restarts take what `elastic_recovery` measured (8 s
planned, 74 s after a loss), it looks for new nodes once a minute, its default, and goes back to its
last checkpoint, one a minute, which it is half of that away from in the mean.

*Real* (`--real-minutes`): the busiest stretch of the trace, four times as fast, at a scale of three
nodes, on a local Ray cluster; workers are paced (`paced_ranks.py`) because the nodes share this
machine's cores.

The oracle works on every node from the moment it is there to the moment it is gone. Prices are per
hour of an on-demand node; a spot node costs `--spot-price` of it while it is there, working or not.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from virtual_cluster import Costs, Replay

from elastic_kfac import __version__

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
NOTICE_S = 30.0
STEP_NODE_S = 4.0
"""A step on one node; half a second on eight."""
SNAPSHOT_S = 2.0
"""`elastic.snapshot_interval_s`."""
LOOKS_EVERY_S, CHECKPOINT_S = 60.0, 60.0
"""Of plain Ray Train."""
REAL_NODES, REAL_SPEED = 3, 4
WANTED = 0.97

Change = tuple[float, str, str]


@dataclass(frozen=True)
class Trace:
    """Nodes that can be had in every gap."""

    gap_s: float
    data: tuple[int, ...]

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Reads a file of the form above.

        Raises:
            SystemExit: With one line, where it is of another form.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            gap, data = float(found["metadata"]["gap_seconds"]), found["data"]
            if gap <= 0 or not data or any(type(n) is not int or n < 0 for n in data):
                raise ValueError("gap_seconds must be positive and data a list of numbers of nodes")
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"{path}: {type(error).__name__}: {error}"
            print(
                f'{message}; expected {{"metadata": {{"gap_seconds": s}}, "data": [nodes, ...]}}',
                file=sys.stderr,
            )
            raise SystemExit(2) from None
        return cls(gap, tuple(data))

    @property
    def seconds(self) -> float:
        return self.gap_s * len(self.data)

    def busiest(self, gaps: int) -> Trace:
        """The stretch of so many gaps in which the number of nodes changes most often."""
        gaps = min(gaps, len(self.data))

        def changes(first: int) -> int:
            part = self.data[first : first + gaps]
            return sum(a != b for a, b in itertools.pairwise(part))

        first = max(range(len(self.data) - gaps + 1), key=changes)
        return Trace(self.gap_s, self.data[first : first + gaps])

    def scaled(self, nodes: int, speed: float) -> Trace:
        """With at most so many nodes, so many times as fast."""
        most = max(self.data)
        return Trace(self.gap_s / speed, tuple(round(n * nodes / most) for n in self.data))

    def changes(self, seed: int = 0) -> list[Change]:
        """Who comes, is told to go, and goes. Losses without notice are a third, at random."""
        pick, found = random.Random(seed), list[Change]()
        nodes, born, number = list[str](), dict[str, float](), 0
        for gap, count in enumerate(self.data):
            at = gap * self.gap_s
            while len(nodes) > count:
                node = nodes.pop(pick.randrange(len(nodes)))
                if pick.random() < 2 / 3:
                    found.append((max(born[node], at - NOTICE_S), node, "notice"))
                found.append((at, node, "down"))
            while len(nodes) < count:
                nodes.append(f"node-{number}")
                born[nodes[-1]] = at
                number += 1
                found.append((at, nodes[-1], "up"))
        return sorted(found, key=lambda change: change[0])


def make_trace(path: Path, *, nodes: int = 8, gaps: int = 480, gap_s: float = 60.0) -> None:
    """Writes the made-up trace."""
    pick = random.Random(23)
    there, back = nodes, list[float]()
    data = []
    for gap in range(gaps):
        now = gap * gap_s
        there += sum(at <= now for at in back)
        back = [at for at in back if at > now]
        lost = sum(pick.random() < gap_s / 7200 for _ in range(there))
        if lost and pick.random() < 0.25:
            lost = min(there, lost + pick.randint(1, 4))
        there -= lost
        back += [now + pick.expovariate(1 / 1200) for _ in range(lost)]
        data.append(there)
    origin = (
        "made up by spot_replay.py: mean life 2 h, return after 20 min, a quarter of losses in bulk"
    )
    content = {"metadata": {"gap_seconds": gap_s, "origin": origin}, "data": data}
    path.write_text(json.dumps(content) + "\n")


def result(name: str) -> Any:
    """The results of a measurement."""
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def measured_costs() -> Costs:
    """From other benchmarks' results."""
    start, gaps = result("start_up")["here"]["parts_s"], result("changes_in_place")
    return Costs(
        prepare=start["actors"]["median"] + start["group"]["median"],
        restore={kind: gaps[kind]["gap"]["p50_s"] for kind in ("grow", "drain", "kill")},
        notice_of_loss=gaps["node lost"]["gap"]["p50_s"],
        snapshot=SNAPSHOT_S,
    )


def virtual(trace: Trace) -> dict[str, Any]:
    """The whole trace in virtual time."""
    began = time.process_time()
    replay = Replay(
        trace.changes(),
        measured_costs(),
        max_workers=max(trace.data),
        step_node_s=STEP_NODE_S,
        notice_s=NOTICE_S,
        end=trace.seconds,
    )
    replay.run()
    return {
        "node_s": replay.steps * STEP_NODE_S,
        "steps": replay.steps,
        "steps_redone": replay.redone,
        "worlds": len(replay.worlds),
        "attempts": sum(name == "group_started" for _, name in replay.calls),
        "cpu_s": round(time.process_time() - began, 1),
    }


def plain_ray_train(trace: Trace) -> float:
    """Node seconds of work that counts, by the model above."""
    recovery = result("elastic_recovery")["plain_ray_train"]
    planned_s, lost_s = (recovery[kind]["median"] for kind in ("planned_s", "kill_s"))
    work, size, idle_until = 0.0, 0, 0.0
    looks = 0.0
    events = trace.changes()
    noticed = {node for _, node, kind in events if kind == "notice"}
    moments = sorted({at for at, _, kind in events if kind != "notice"} | {trace.seconds})
    there, now = set[str](), 0.0
    for moment in moments:
        while now < moment:
            # It grows at its looks only.
            end = min(moment, looks)
            work += size * max(0.0, end - max(now, idle_until))
            now = end
            if now == looks:
                looks += LOOKS_EVERY_S
                if len(there) > size:
                    work -= size * CHECKPOINT_S / 2
                    size, idle_until = len(there), max(idle_until, now) + planned_s
        lost = [node for at, node, kind in events if at == moment and kind == "down"]
        there |= {node for at, node, kind in events if at == moment and kind == "up"}
        there -= set(lost)
        if len(there) < size or lost:
            stall_s = planned_s if noticed.issuperset(lost) else lost_s
            work -= size * CHECKPOINT_S / 2
            size, idle_until = len(there), max(idle_until, now) + stall_s
    return max(0.0, work)


def shares(trace: Trace, spot_price: float) -> dict[str, Any]:
    """The virtual replay against oracle, plain Ray Train and on-demand nodes."""
    oracle = sum(trace.data) * trace.gap_s
    ours = virtual(trace)
    plain = plain_ray_train(trace)

    def price(work: float) -> float:
        """On-demand node hours' worth for the work of one node hour."""
        return round(spot_price * oracle / work, 3)

    return {
        "oracle_node_hours": round(oracle / 3600, 2),
        "ours": {
            **ours,
            "of_oracle": round(ours["node_s"] / oracle, 4),
            "price": price(ours["node_s"]),
        },
        "plain_ray_train_model": {"of_oracle": round(plain / oracle, 4), "price": price(plain)},
        "on_demand": {"price": 1.0},
        "spot_price": spot_price,
        "met": ours["node_s"] / oracle >= WANTED,
    }


def real(trace: Trace, minutes: float) -> dict[str, Any]:
    """A stretch of the trace on this machine."""
    from elastic_kfac.cli.entry import main as elastic_kfac
    from elastic_kfac.cluster.ray.connection import quiet_driver
    from elastic_kfac.cluster.ray.local_cluster import LocalCluster
    from elastic_kfac.cluster.run.coordinator import RunView
    from elastic_kfac.cluster.run.progress import Display
    from elastic_kfac.cluster.run.trainer import train
    from elastic_kfac.config import parse_config
    from elastic_kfac.runs.audit import audit_run
    from elastic_kfac.state.run_folder import RunFolder

    sys.path.insert(0, str(HERE.parents[1] / "tests"))
    from support.preemption import drain_node

    gaps = max(2, round(minutes * 60 / (trace.gap_s / REAL_SPEED)))
    part = trace.busiest(gaps).scaled(REAL_NODES, REAL_SPEED)
    end = part.seconds

    class Follow(Display):
        """Gives and takes nodes; presses Ctrl-C at the end."""

        def __init__(self, cluster: LocalCluster) -> None:
            self._cluster, self._left = cluster, part.changes()
            self._names: dict[str, int] = {}
            self._present = list(cluster.nodes)
            self.began: float | None = None
            self.node_s = 0.0
            self._counted_at = 0.0

        def update(self, view: RunView) -> None:
            if self.began is None:
                # The nodes of the first gap are there already, and so is the run.
                if len(view.pids) < part.data[0] or int(view.progress.get("step", 0)) < 10:
                    return
                self.began = time.time()
                first = [c for c in self._left if c[0] == 0.0 and c[2] == "up"]
                self._names = {c[1]: node for c, node in zip(first, self._present, strict=True)}
                self._left = [c for c in self._left if c not in first]
            now = time.time() - self.began
            self.node_s += len(self._cluster.nodes) * (min(now, end) - self._counted_at)
            self._counted_at = min(now, end)
            if self._left and now >= self._left[0][0]:
                _, node, kind = self._left.pop(0)
                if kind == "up":
                    self._names[node] = self._cluster.add_node(wait=False)
                elif kind == "notice":
                    drain_node(self._cluster, self._names[node], deadline_s=600)
                else:
                    self._cluster.remove_node(self._names.pop(node))
            elif now >= end and self._left is not None:
                self._left = []
                if not hasattr(self, "ended"):
                    self.ended = time.time()
                    threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    logging.disable(logging.INFO)
    paths = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), str(HERE)) if p)
    load = [round(os.getloadavg()[0], 1)]
    with (
        tempfile.TemporaryDirectory(prefix="ek-spot-") as name,
        patch.dict(os.environ, {"PYTHONPATH": paths}),
    ):
        elastic_kfac(["shards", "make", "--source", "digits", "--out", f"{name}/digits"])
        config = parse_config(
            {
                "data": {"shards": f"{name}/digits"},
                "train": {
                    "epochs": 100_000,
                    "global_batch_size": 32,
                    "eval_every_epochs": 500,
                    "log_every_steps": 1,
                },
                "optimizer": {"lr": 0.02},
                "kfac": {"damping": 1e-2, "kl_clip": 1e-4, "inverse_update_steps": 20},
                "elastic": {
                    "max_workers": REAL_NODES,
                    "snapshot_interval_s": 0.5,
                    "in_place": True,
                },
            }
        )
        with quiet_driver(), LocalCluster(part.data[0]) as cluster:
            cluster.connect()
            follow = Follow(cluster)
            train(
                config,
                name="run",
                storage=name,
                cluster=cluster,
                progress=follow,
                rank_function="paced_ranks:run",
                member_function="paced_ranks:member",
            )
        folder = RunFolder(f"{name}/run")
        events = folder.events()
        rows = [row for row in folder.metrics() if "loss" in row]
        problems = list(audit_run(folder).problems)
    load.append(round(os.getloadavg()[0], 1))
    assert follow.began is not None
    first = next(row["time"] for row in events if row["kind"] == "start")
    begin = follow.began - first
    inside = [row for row in rows if begin <= row["wall_time_s"] < begin + end]
    # A paced step takes the same time in every world, and uses all of its nodes for that time. The oracle
    # refreshes curvature and evaluates as well: its steps are as long as ours where the world stays.
    ordinary = [
        after["wall_time_s"] - before["wall_time_s"]
        for before, after in itertools.pairwise(inside)
        if before["world_size"] == after["world_size"]
    ]
    step_s, median_s = statistics.fmean(ordinary), statistics.median(ordinary)
    work = step_s * sum(row["world_size"] for row in inside)
    changes = [row for row in events if row["kind"] in ("resize", "recovery")]
    return {
        "minutes": minutes,
        "speed": REAL_SPEED,
        "nodes": list(part.data),
        "of_oracle": round(work / follow.node_s, 4),
        "of_oracle_with_median_steps": round(median_s / step_s * work / follow.node_s, 4),
        "goal_met": work / follow.node_s >= WANTED,
        "steps": len(inside),
        "step_s": round(step_s, 4),
        "median_step_s": round(median_s, 4),
        "changes": [
            {key: row[key] for key in ("kind", "from_world_size", "to_world_size", "downtime_s")}
            for row in changes
        ],
        "steps_redone": sum(int(row["steps_redone"]) for row in changes),
        "ledger_problems": problems,
        "load": load,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", type=Path, default=HERE / "spot_trace.json")
    parser.add_argument("--gaps", type=int, help="only so many gaps, from the first on")
    parser.add_argument("--make-trace", type=Path, help="write the made-up trace there, and stop")
    parser.add_argument("--spot-price", type=float, default=0.35, help="of an on-demand node")
    parser.add_argument("--real-minutes", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "spot_replay.json")
    arguments = parser.parse_args()
    if arguments.make_trace:
        make_trace(arguments.make_trace)
        return 0
    if not 0 < arguments.spot_price <= 1:
        parser.error(f"--spot-price: {arguments.spot_price:g} is not above 0 and at most 1")
    trace = Trace.read(arguments.trace)
    if arguments.gaps is not None:
        if not 1 <= arguments.gaps <= len(trace.data):
            parser.error(f"--gaps: {arguments.gaps} is not from 1 to {len(trace.data)}")
        trace = Trace(trace.gap_s, trace.data[: arguments.gaps])
    replayed = shares(trace, arguments.spot_price)
    print(json.dumps(replayed), flush=True)
    report: dict[str, Any] = {
        "benchmark": "spot_replay",
        "what": "work done on spot nodes, as a share of an oracle without any downtime; prices of the "
        "work of a node hour, in hours of an on-demand node",
        "trace": {
            "file": arguments.trace.name,
            "hours": round(trace.seconds / 3600, 2),
            "nodes": [min(trace.data), max(trace.data)],
            "mean_nodes": round(statistics.mean(trace.data), 2),
            "losses": sum(kind == "down" for _, _, kind in trace.changes()),
        },
        "virtual": replayed,
        "wanted_of_oracle": WANTED,
        "machine": {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)},
        "versions": {"python": platform.python_version(), "elastic_kfac": __version__},
    }
    if arguments.real_minutes > 0:
        report["real"] = real(trace, arguments.real_minutes)
        print(json.dumps(report["real"]), flush=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report.get("real", {}).get("ledger_problems") else 0


if __name__ == "__main__":
    raise SystemExit(main())
