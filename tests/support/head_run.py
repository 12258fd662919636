"""A run as a job on a real head, watched through its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastic_kfac.state.run_folder import RunFolder
from support.ray_head import RayHead, until

PATIENCE_S = 300
STEPS = 30


def started_job(head: RayHead, storage: Path) -> RunFolder:
    """A run that continues until it is stopped, on as many nodes as there are."""
    job = head.submit(
        "jobs/train.py",
        *("jobs/configs/digits.yaml", "--storage", str(storage), "--name", "run"),
        *("--set", f"data.shards={storage}/digits", "--set", "train.epochs=100000"),
        options=("--no-wait", "--submission-id", "run"),
    )
    assert job.returncode == 0, job.stdout + job.stderr
    return RunFolder(storage / "run")


def steps_on(folder: RunFolder, *world_sizes: int) -> bool:
    """Whether groups of these sizes followed each other, and the last one has stepped for a while."""
    if not (Path(folder.storage.path()) / "metrics.jsonl").exists():
        return False
    rows = [row for row in folder.metrics() if "loss" in row]
    sizes = [row["world_size"] for row in rows]
    changes = [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] != size]
    return changes == list(world_sizes) and set(sizes[-STEPS:]) == {world_sizes[-1]}


def events(folder: RunFolder, *kinds: str) -> list[dict[str, Any]]:
    return [dict(row) for row in folder.events() if row["kind"] in kinds]


def await_group(head: RayHead, folder: RunFolder, *world_sizes: int) -> None:
    arrived: Callable[[], bool] = lambda: steps_on(folder, *world_sizes)  # noqa: E731
    assert until(arrived, PATIENCE_S), head.ray("job", "logs", "run").stdout[-3000:]
