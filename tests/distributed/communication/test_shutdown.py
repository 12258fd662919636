"""A process ends while Gloo's threads still hold tensors of finished collectives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
STARVED = """
import os, sys, tempfile
import torch, torch.distributed as dist
import elastic_kfac.communication.collectives
from elastic_kfac.communication.shutdown import settle

torch.set_num_threads(1)
before = set(os.listdir("/proc/self/task"))
store = f"file://{tempfile.mktemp()}"
dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
dist.all_reduce(torch.ones(1))
core = {min(os.sched_getaffinity(0))}
os.sched_setaffinity(0, core)
for thread in map(int, set(os.listdir("/proc/self/task")) - before):
    # They run when nothing else wants to, so that wait() returns while they still hold the tensors.
    os.sched_setaffinity(thread, core)
    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
tensors = [torch.ones(1000) for _ in range(8)]
for tensor in tensors:
    dist.all_reduce(tensor, async_op=True).wait()
held = max(tensor._use_count() for tensor in tensors)
if sys.argv[1] == "settle":
    settle()
print(held, max(tensor._use_count() for tensor in tensors), flush=True)
"""


def end(how: str) -> list[int]:
    """Users of a tensor before and after `settle`; the process must end in order."""
    done = subprocess.run(
        [sys.executable, "-c", STARVED, how],
        env={**os.environ, "PYTHONPATH": str(ROOT / "platform"), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [int(count) for count in done.stdout.split()]


def test_no_thread_holds_a_tensor_after_settling() -> None:
    assert end("settle")[1] == 1


def test_a_process_ends_in_order_while_threads_hold_tensors() -> None:
    assert len(end("exit")) == 2
