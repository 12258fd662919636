"""Folders of searches as `elastic-kfac tune` writes them, made without training anything."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from pathlib import Path
from typing import Any

from elastic_kfac.experiments.trials import NUMBERS

PARAMETERS = ("kfac.damping", "kfac.inverse_update_steps", "kfac.kl_clip_rule")
TARGET = 0.95
BEGAN = 1_760_000_000.0
COLUMNS = (
    "trial_id",
    "stage",
    "point",
    "status",
    "reason",
    "seed",
    *PARAMETERS,
    "reached",
    *NUMBERS,
    "run_folder",
    "parent",
)
HOSTILE = "</script><script>window.broken=1</script>\"'><img src=x onerror=window.broken=1>$x_1$&"


def row(**cells: Any) -> dict[str, Any]:
    """A row of `trials.csv` with every column."""
    unknown = set(cells) - set(COLUMNS)
    assert not unknown, unknown
    return {name: cells.get(name, "") for name in COLUMNS}


def rows(seeds: int = 3, points: int = 14) -> list[dict[str, Any]]:
    """Two references and a search in which some points miss, fail, are stopped or refused.

    The time to the target depends on the damping (best near 0.02) and hardly on anything else.
    """
    draw, found, clock = random.Random(5), [], BEGAN

    def tried(trial: str, stage: str, point: str, seed: int, status: str, slow: float) -> None:
        nonlocal clock
        seconds = 3.0 * slow * (1 + 0.08 * draw.random())
        reached = status == "finished" and slow < 5.5
        took = seconds if reached else 14.0 if status == "finished" else 5.0
        lost = 0.0 if reached else 0.03 * slow / 5
        begun, clock = clock, clock + took + 1.5
        found.append(
            row(
                trial_id=trial,
                stage=stage,
                point=point,
                seed=seed,
                status=status,
                objective=round(seconds, 4) if reached else "",
                reached={True: "true", False: "false"}[reached],
                train_time_to_accuracy_s=round(seconds, 4) if reached else "",
                time_to_accuracy_s=round(seconds + 2, 4) if reached else "",
                steps=round(40 * took),
                train_time_s=round(took, 4),
                worker_seconds=round(2 * took, 4),
                cpu_seconds=round(1.9 * took, 4),
                best_value=round(TARGET + 0.01 - lost, 6) if reached else round(0.94 - lost, 6),
                peak_memory_bytes=int((310 + 60 / slow + 4 * draw.random()) * 2**20),
                started=begun,
                ended=clock - 0.5,
                run_folder=f"trials/{trial}",
            )
        )

    for name, slow in (("default", 2.1), ("sgd", 3.6)):
        for seed in range(seeds):
            tried(f"{name}-{seed}", "reference", name, seed, "finished", slow)
    for number in range(points):
        damping = 10 ** draw.uniform(-3.5, 0)
        slow = 1 + 1.6 * abs(math.log10(damping / 0.02))
        values = (damping, draw.choice([5, 10, 20]), draw.choice(["sum", "layer"]))
        for seed in range(seeds):
            trial = f"p{number:03d}-s{seed}"
            if number == 3:
                refused = row(trial_id=trial, stage="search", point=number, seed=seed)
                refused |= {"status": "refused", "reason": "9.1 GiB needed, 4.0 GiB are there"}
                found.append(refused)
            else:
                status = "stopped" if number == 7 else "finished"
                tried(trial, "search", str(number), seed, status, slow)
                if number == 5 and seed == 1:
                    found[-1] |= {"status": "failed", "objective": "", "reached": "false"}
                    found[-1]["reason"] = "NumericalError: the loss is not finite at step 12"
            found[-1] |= dict(zip(PARAMETERS, (json.dumps(values[0]), *values[1:]), strict=True))
    return found


def about(found: list[dict[str, Any]], **replaced: Any) -> dict[str, Any]:
    """The content of `experiment.json`."""
    references = {name: [r for r in found if r["point"] == name] for name in ("default", "sgd")}
    config = {"kfac": {"damping": 0.001, "inverse_update_steps": 10}}
    return {
        "name": "tune-smoke-1",
        "status": "finished",
        "started": BEGAN,
        "updated": BEGAN + 900,
        "objective": {
            "metric": "train_time_to_accuracy_s",
            "mode": "min",
            "unit": "training seconds",
        },
        "target_accuracy": TARGET,
        "rule_for_censored": "Trials that miss the target rank behind all others.",
        "n_repeats": max([int(r["seed"]) for r in found], default=0) + 1,
        "parameters": list(PARAMETERS),
        "best": None,
        "references": {n: {"config": config, "rows": each} for n, each in references.items()},
        "hardware": {"processor": "a processor", "cores": "2"},
        "versions": {"elastic-kfac": "0.1.0", "torch": "2.15.0"},
        "space": {
            "parameters": {
                "kfac.damping": {"loguniform": [1e-4, 1.0]},
                "kfac.inverse_update_steps": {"choice": [5, 10, 20]},
                "kfac.kl_clip_rule": {"choice": ["sum", "layer"]},
            },
            "objective": {"censored": "by_distance"},
            "searcher": {"name": "random"},
            "num_trials": 14,
            "references": {"default": {}, "sgd": {"kfac.enabled": False}},
            "confirm": 0,
        },
    } | replaced


def write_search(
    folder: Path,
    found: list[dict[str, Any]],
    *,
    runs: bool = True,
    best_config: str | None = "kfac:\n  damping: 0.02\n",
    **replaced: Any,
) -> Path:
    """Writes a folder; keyword arguments replace values of `experiment.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.json").write_text(json.dumps(about(found, **replaced)), encoding="utf-8")
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    (folder / "trials.csv").write_text(out.getvalue(), encoding="utf-8")
    if best_config is not None:
        (folder / "best_config.yaml").write_text(best_config, encoding="utf-8")
    for each in found if runs else ():
        if each["run_folder"] and each["started"] != "":
            _write_run(folder / each["run_folder"], each)
    return folder


def _write_run(folder: Path, cells: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    took, steps = float(cells["train_time_s"]), int(cells["steps"])
    lines = []
    for index in range(1, 13):
        step = {
            "step": steps * index // 12,
            "wall_time_s": took * index / 12 + 2,
            "loss": 1 / index,
        }
        lines.append(json.dumps(step))
        accuracy = float(cells["best_value"]) * (1 - math.exp(-index / 2)) / (1 - math.exp(-6))
        lines.append(
            json.dumps(step | {"train_time_s": took * index / 12, "eval_accuracy": accuracy})
        )
    # A run that is being written may end in half a row.
    text = "\n".join(lines) + '\n{"step": 999, "eval_accuracy": 0.'
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if cells["seed"] == 1:
        change = {"time": float(cells["started"]) + took / 2, "kind": "resize", "step": steps // 2}
        change |= {"from_world_size": 2, "to_world_size": 1}
        (folder / "events.jsonl").write_text(json.dumps(change) + "\n", encoding="utf-8")
