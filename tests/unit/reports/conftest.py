"""A run folder as the platform writes it: 2 → 1 → 2 workers, one node removed, one killed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS_PER_WORLD_SIZE = ((2, 0, 60, 0.0), (1, 60, 130, 14.0), (2, 130, 210, 31.0))


def metric_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for world_size, first, last, start in STEPS_PER_WORLD_SIZE:
        for step in range(first + 1, last + 1):
            step_time = 0.13 if world_size == 1 else 0.09
            wall = start + (step - first) * step_time
            rows.append(
                {
                    "step": step,
                    "epoch": step / 12,
                    "samples": step * 128,
                    "world_size": world_size,
                    "global_batch_size": 128,
                    "loss": 2.3 * math.exp(-step / 40) + 0.02 * (1.3 + math.sin(step * 2.3)),
                    "accuracy": 1 - 0.9 * math.exp(-step / 25) - 0.01 * math.sin(step) ** 2,
                    "lr": 0.05 * (0.5 + 0.5 * math.cos(math.pi * step / 210)) + 1e-5,
                    "damping": 1e-3,
                    "step_time_s": step_time * (1 + 0.1 * math.sin(step * 1.7)),
                    "wall_time_s": wall,
                    "factor_updates": step,
                    "inverse_updates": 1 + step // 10,
                }
            )
            if step % 24 == 0:
                accuracy = 1 - 0.75 * math.exp(-step / 30) - 0.012
                rows.append(
                    {
                        "step": step,
                        "epoch": step / 12,
                        "world_size": world_size,
                        "wall_time_s": wall + 0.05,
                        "eval_loss": 0.1,
                        "eval_accuracy": accuracy,
                    }
                )
    return rows


EVENTS = [
    {
        "time": 1000.0,
        "kind": "resize",
        "step": 60,
        "from_world_size": 2,
        "to_world_size": 1,
        "reason": "node removed",
        "downtime_s": 8.6,
        "steps_redone": 0,
        "plan": "layer  column  workers\nconv1  0       0",
    },
    {
        "time": 1020.0,
        "kind": "recovery",
        "step": 130,
        "from_world_size": 1,
        "to_world_size": 2,
        "reason": "<b>node</b> added",
        "downtime_s": 7.9,
        "steps_redone": 3,
        "way": "resize",
        "moved_bytes": 5 * 2**18,
        "plan": "layer  column  workers\nconv1  0       0 1",
    },
]

RESULT = {
    "status": "finished",
    "steps": 210,
    "epochs": 17.5,
    "samples_committed": 26880,
    "best_accuracy": 0.9861,
    "target_accuracy": 0.97,
    "time_to_accuracy_s": 33.4,
    "train_time_to_accuracy_s": 18.2,
    "worker_seconds": 60.1,
    "gpu_seconds": 0.0,
    "final_state_sha256": "ab" * 32,
    "world_sizes": [2, 1, 2],
    "resizes": 2,
    "steps_redone": 3,
    "provenance": {"python": "3.11.7", "torch": "2.15.0", "hardware": "2 cores"},
}

CONFIG = """
data: {shards: data/digits}
model: {name: small_cnn}
train: {target_accuracy: 0.97}
optimizer: {name: sgd}
kfac: {enabled: true}
"""


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder; keyword arguments replace the content of its files (None: no file)."""

    def make(name: str = "digits-1", **replaced: str | None) -> Path:
        files: dict[str, str | None] = {
            "config.yaml": CONFIG,
            "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in metric_rows()),
            "events.jsonl": "".join(json.dumps(row) + "\n" for row in EVENTS),
            "result.json": json.dumps(RESULT),
        }
        files |= {key.replace("__", "."): value for key, value in replaced.items()}
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            if content is not None:
                (folder / file).write_text(content, encoding="utf-8")
        return folder

    return make
