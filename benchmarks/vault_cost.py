"""What protecting the state costs while nothing happens: CPU time of snapshots over CPU time of steps.

One rank takes a state into two vaults as a run does: copied out of the model, made into bytes, hashed,
put into the object store and kept by the vaults. CPU time counts in the rank's process and in the
vaults'. The reference is the CPU time of steps of any length on one busy core. The loop takes a snapshot
per `elastic.snapshot_interval_s` (2 s), or as seldom as its share asks for: `interval_s` is what it
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
from pathlib import Path
from typing import Any

import ray
import torch

from elastic_kfac.cluster.local_cluster import LocalCluster
from elastic_kfac.cluster.ray_adapter import quiet_driver
from elastic_kfac.cluster.vault import VaultKeeper, head_node
from elastic_kfac.cluster.vault_store import VaultStore
from elastic_kfac.training.checkpoint import CheckpointStore
from elastic_kfac.training.ledger import LedgerValue
from elastic_kfac.training.loop import SNAPSHOT_SHARE, affordable_interval_s
from elastic_kfac.training.state import Progress, capture

SIZES = (100_000, 1_000_000, 5_000_000, 25_000_000)
INTERVAL_S = 2.0
REPEATS = 5


def cpu_seconds(pid: int) -> float:
    """CPU time of another process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(parameters: int, store: VaultStore, vault_pids: list[int]) -> dict[str, Any]:
    """CPU seconds per snapshot of a model of this size with momentum."""
    width = round(parameters**0.5)
    model = torch.nn.Linear(width, width, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(1, width)).sum().backward()
    optimizer.step()
    rank, vaults, blocked, intervals = [], [], [], []
    for step in range(1, REPEATS + 1):
        begin, begin_vaults = time.process_time(), sum(map(cpu_seconds, vault_pids))
        begin_capture = time.thread_time()
        state = capture(
            model=model,
            optimizer=optimizer,
            parts={},
            progress=Progress(step=step),
            ledger=LedgerValue(),
            seed=0,
            data_sha256="",
            config_sha256="",
        )
        capture_s = time.thread_time() - begin_capture
        blocked.append(time.process_time() - begin)
        saving = store.save_async(state)
        assert saving is not None
        assert saving.result()
        rank.append(time.process_time() - begin)
        intervals.append(max(INTERVAL_S, affordable_interval_s(capture_s, store)))
        time.sleep(0.5)
        vaults.append(sum(map(cpu_seconds, vault_pids)) - begin_vaults)
    total = statistics.median(rank) + statistics.median(vaults)
    interval_s = statistics.median(intervals)
    return {
        "parameters": width * width,
        "snapshot_bytes": len(state.to_bytes()),
        "rank_cpu_s": round(statistics.median(rank), 4),
        "of_which_between_steps_s": round(statistics.median(blocked), 4),
        "vaults_cpu_s": round(statistics.median(vaults), 4),
        "interval_s": round(interval_s, 2),
        "share": round(total / interval_s, 4),
        "share_without_resting": round(total / INTERVAL_S, 4),
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
        keeper = VaultKeeper(home)
        buddy = cluster.node_id(cluster.nodes[0])
        keeper.follow({0: buddy}, {buddy})
        places = keeper.places
        pids = [
            ray.get(place.vault.__ray_call__.remote(lambda vault: os.getpid())) for place in places
        ]
        store = VaultStore(
            CheckpointStore(folder), lambda: places, attempt=1, checkpoint_interval_s=1e9
        )
        rows = [measure(size, store, pids) for size in SIZES]
        store.close()
        keeper.close()
    report = {
        "what": "CPU time of snapshots in rank and vaults over CPU time of steps; 2 vaults",
        "target_share": SNAPSHOT_SHARE,
        "met": all(row["share"] <= SNAPSHOT_SHARE for row in rows),
        "snapshot_interval_s": INTERVAL_S,
        "rows": rows,
        "n": REPEATS,
        "hardware": f"{platform.machine()}, {os.cpu_count()} shared cores",
        "load": round(os.getloadavg()[0], 1),
        "versions": {"torch": torch.__version__, "ray": ray.__version__},
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
