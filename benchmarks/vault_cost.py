"""What protecting the state costs while nothing happens: CPU time of snapshots over CPU time of steps.

One rank takes a state into two vaults as a run does: copied out of the model, hashed, put into the
object store and kept by the vaults. CPU time counts in the rank's process, in the vaults' and in the
nodes' raylets, less what the same processes take in as long a time without snapshots (given beside
it for the vaults, which would not be there otherwise: `idle_vault_share` of one core each). The
reference is the CPU time of steps of any length on one busy core. The loop takes a snapshot per
`elastic.snapshot_interval_s` (2 s), or as seldom as its share asks for: `interval_s` is what it
chooses from what the rank can measure, `share` what snapshots at that interval really cost.

    python benchmarks/vault_cost.py [--out benchmarks/results/vault_cost.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from elastic_kfac.cluster.ray.connection import quiet_driver
from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.ray.nodes import head_node
from elastic_kfac.cluster.run.replicas import (
    ReplicaActor,
    ReplicaActors,
    ReplicatedStore,
)
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.ledger import LedgerValue
from elastic_kfac.state.state import Progress, capture
from elastic_kfac.training.loop import SNAPSHOT_SHARE, affordable_interval_s

SIZES = (100_000, 1_000_000, 5_000_000, 25_000_000)
INTERVAL_S = 2.0
SNAPSHOTS = 20
FIRST = 3
"""Snapshots before those that count: they touch new memory, and the model has to be there."""
REST_S = 0.25


class Clocks:
    """CPU time in s of groups of processes; the rank is this one."""

    def __init__(self, **groups: Sequence[int]) -> None:
        """Groups of process ids."""
        self._groups = groups

    def now(self) -> dict[str, float]:
        """Since each process began."""
        others = {name: sum(map(cpu_seconds, pids)) for name, pids in self._groups.items()}
        return {"rank": time.process_time(), **others}


def cpu_seconds(pid: int) -> float:
    """CPU time of another process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def process_ids(vault: ReplicaActor) -> tuple[int, int]:
    """Of a vault and of its node's raylet, which is its parent; called in the vault."""
    return os.getpid(), os.getppid()


def measure(parameters: int, store: ReplicatedStore, vault: Any, clocks: Clocks) -> dict[str, Any]:
    """CPU seconds per snapshot of a model of this size with momentum."""
    width = round(parameters**0.5)
    model = torch.nn.Linear(width, width, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(1, width)).sum().backward()
    optimizer.step()

    def snapshot(step: int) -> tuple[float, float]:
        """CPU time of the part between two steps, and time to the next snapshot."""
        begin = time.thread_time()
        state = capture(
            model=model,
            optimizer=optimizer,
            parts={},
            progress=Progress(step=step),
            ledger=LedgerValue(),
            seed=0,
            data_sha256="",
            config={},
        )
        capture_s = time.thread_time() - begin
        saving = store.save_async(state)
        assert saving is not None
        assert saving.result()
        interval_s = max(INTERVAL_S, affordable_interval_s(capture_s, store))
        time.sleep(REST_S)
        return capture_s, interval_s

    for step in range(FIRST):
        snapshot(step)
    begin, begin_s = clocks.now(), time.perf_counter()
    capturing, intervals = zip(*map(snapshot, range(FIRST, FIRST + SNAPSHOTS)), strict=True)
    after, elapsed_s = clocks.now(), time.perf_counter() - begin_s
    time.sleep(elapsed_s)
    rested = clocks.now()
    idle = {name: rested[name] - after[name] for name in after}
    spent = {name: (after[name] - begin[name] - idle[name]) / SNAPSHOTS for name in after}
    interval_s = statistics.mean(intervals)
    total = sum(spent.values())
    return {
        "parameters": width * width,
        "snapshot_bytes": ray.get(vault.infos.remote(0))[-1].num_bytes,
        "cpu_s": round(total, 4),
        **{f"{name}_cpu_s": round(value, 4) for name, value in spent.items()},
        "of_which_between_steps_s": round(statistics.mean(capturing), 4),
        "rank_expects_cpu_s": round(capturing[-1] + store.snapshot_cpu_s, 4),
        "interval_s": round(interval_s, 2),
        "share": round(total / interval_s, 4),
        "share_without_resting": round(total / INTERVAL_S, 4),
        "idle_vault_share": round(idle["vaults"] / elapsed_s / 2, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).parent / "results" / "vault_cost.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        quiet_driver(),
        LocalCluster(1, object_store_mib=1024) as cluster,
    ):
        cluster.connect()
        home = head_node()
        assert home is not None
        keeper = ReplicaActors(home)
        buddy = cluster.node_id(cluster.nodes[0])
        keeper.follow({0: buddy}, {buddy})
        places = keeper.places
        asked = [actor.__ray_call__.remote(process_ids) for actor in places.values()]
        vaults, raylets = zip(*ray.get(asked), strict=True)
        clocks = Clocks(vaults=vaults, raylets=raylets)
        store = ReplicatedStore(
            CheckpointStore(folder), lambda: places, attempt=1, checkpoint_interval_s=1e9
        )
        rows = [measure(size, store, places[home], clocks) for size in SIZES]
        store.close()
        keeper.close()
    report = {
        "what": "CPU time of snapshots in rank, vaults and raylets over that of steps; 2 vaults",
        "target_share": SNAPSHOT_SHARE,
        "met": all(row["share"] <= SNAPSHOT_SHARE for row in rows),
        "snapshot_interval_s": INTERVAL_S,
        "rows": rows,
        "n": SNAPSHOTS,
        "hardware": f"{platform.machine()}, {os.cpu_count()} shared cores",
        "load": round(os.getloadavg()[0], 1),
        "versions": {"torch": torch.__version__, "ray": ray.__version__},
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
