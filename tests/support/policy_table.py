"""The table of docs/tasks.md that says which policy works with which task, and a small run of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from support.task_sources import MODELS, letters, numbers, objects, prose, reviews, scenes

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
HEAD = "| task | batch policies |"

RUNS: dict[str, tuple[Callable[[Path], str], str, int]] = {
    "classification": (lambda folder: "digits", "classifier64", 480),
    "regression": (numbers, "regressor64", 32),
    "segmentation": (scenes, "pixels64", 12),
    "causal_lm": (prose, "next_token64", 64),
    "masked_lm": (letters, "next_token64", 64),
    "sequence_classification": (reviews, "bag64", 32),
    "autoencoding": (scenes, "autoencoder64", 12),
    "detection": (objects, "anchors64", 12),
}
"""Source, model of `support.task_models`, and batch size by task."""


def read_table() -> dict[str, dict[str, str]]:
    """Task -> column -> `yes` or `refused`."""
    lines = PAGE.read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(HEAD))
    names = _cells(lines[start])[1:]
    table = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        task, *cells = _cells(line)
        table[task.strip("`")] = dict(zip(names, cells, strict=True))
    assert table.keys() == RUNS.keys()
    assert {cell for row in table.values() for cell in row.values()} <= {"yes", "refused"}
    return table


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def source_of(task: str, folder: Path) -> str:
    """The source of a task's samples; files it needs are written below the folder."""
    return RUNS[task][0](folder)


def values_of(task: str, shards: Path | str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in float64; `section.key` paths change it."""
    _, model, size = RUNS[task]
    values: dict[str, Any] = {
        "data": {"shards": str(shards), "cache_dir": f"{shards}-cache"},
        "task": {"name": task},
        "model": {"name": f"{MODELS}:{model}"},
        "train": {"global_batch_size": size, "eval_every_epochs": 100},
        "optimizer": {"lr": 0.001 if task == "autoencoding" else 0.02},
        "elastic": {"max_workers": 4, "snapshot_interval_s": 1e9},
    }
    for path, value in changes.items():
        section, key = path.split(".")
        values.setdefault(section, {})[key] = value
    return values
