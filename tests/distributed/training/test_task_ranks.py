"""Tokens with padding, pixels and boxes: the same run on any number of ranks, every sample once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch import nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import parse_config
from elastic_kfac.data.shards import make_shards
from elastic_kfac.runs.audit import audit_run
from elastic_kfac.runs.final_record import compact_ledger
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.training.callbacks import FolderWriter, KeepGoing
from elastic_kfac.training.loop import run_rank
from support import task_models
from support.gloo import run_ranks
from support.training_problems import states_differ_in


def double(name: str, *given: Any, **named: Any) -> nn.Module:
    model: nn.Module = getattr(task_models, name)(*given, **named).double()
    return model


def tokens64(num_outputs: int, input_shape: tuple[int, ...]) -> nn.Module:
    return double("NextToken", num_outputs, input_shape)


def pixels64(num_outputs: int, input_shape: tuple[int, ...]) -> nn.Module:
    return double("pixel_network", num_outputs, input_shape)


def anchors64(num_outputs: int, input_shape: tuple[int, ...]) -> nn.Module:
    return double("Anchors", num_outputs, input_shape)


def bags64(num_outputs: int, input_shape: tuple[int, ...], *, columns: Any) -> nn.Module:
    return double("BagOfTokens", num_outputs, input_shape, columns=columns)


def lines(folder: Path) -> str:
    draw = np.random.default_rng(1)
    rows = [" ".join(draw.choice(["ab", "cde", "f"], draw.integers(1, 7))) for _ in range(70)]
    labels = ["long" if len(row) > 10 else "short" for row in rows]
    pq.write_table(pa.table({"text": rows, "label": labels}), folder / "lines.parquet")
    return f"text:{folder / 'lines.parquet'}"


def squares(folder: Path) -> str:
    """Masks in which a part of the pixels has no class."""
    draw = np.random.default_rng(1)
    for name in ("images", "masks"):
        (folder / "squares" / name).mkdir(parents=True)
    for index in range(50):
        pixels = draw.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        mask = (pixels[:, :, 0] > 127).astype(np.uint8)
        mask[: index % 5] = 255
        Image.fromarray(pixels).save(folder / "squares" / "images" / f"{index}.png")
        Image.fromarray(mask).save(folder / "squares" / "masks" / f"{index}.png")
    return f"masks:{folder / 'squares'}"


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "causal_lm": ("lines=1", "tokens64", {}),
    "masked_lm": ("lines=1", "tokens64", {"kfac.fisher": "1mc"}),
    "sequence_classification": ("label=label", "bags64", {}),
    "segmentation": ("", "pixels64", {"data.augment": "crop_flip"}),
}


def values_of(folder: str, task: str, reproducible: bool) -> dict[str, Any]:
    _, model, changes = CASES[task]
    values: dict[str, Any] = {
        "data": {"shards": f"{folder}/set", "cache_dir": f"{folder}/cache"},
        "model": {"name": f"{__name__}:{model}"},
        "task": {"name": task},
        "train": {
            "epochs": 2,
            "global_batch_size": 16,
            "micro_batch_size": 5,
            "eval_batch_size": 4,
        },
        "optimizer": {"lr": 0.05},
        "kfac": {"damping": 0.01, "inverse_update_steps": 3},
        "elastic": {"snapshot_interval_s": 1e9, "max_workers": 8},
    }
    if reproducible:
        values["elastic"]["reproducible"] = True
        values["train"]["micro_batch_size"] = None
    for path, value in changes.items():
        if not (reproducible and path == "kfac.fisher"):
            section, key = path.split(".")
            values[section][key] = value
    return values


def train_on_ranks(folder: str, task: str, reproducible: bool, world_size: int) -> str:
    """Trains on the first ranks of the world; the hash of the final state."""
    world = Communicator.world()
    part = world.subgroup(range(world_size)) if world_size < world.world_size else world
    if world.rank >= world_size:
        return ""
    config = parse_config(values_of(folder, task, reproducible))
    run = RunFolder(f"{folder}/{task}-{reproducible}-{world_size}")
    if part.rank == 0:
        run.write_config(config)
    writer = FolderWriter(run)
    outcome = run_rank(
        config, part, store=CheckpointStore(run.uri), callback=writer, control=KeepGoing()
    )
    return outcome.state_sha256


@pytest.mark.slow
@pytest.mark.parametrize("task", CASES)
def test_a_task_gives_the_same_run_on_one_and_three_ranks(task: str, tmp_path: Path) -> None:
    options, _, _ = CASES[task]
    source = lines(tmp_path) + f"?{options}" if options else squares(tmp_path)
    make_shards(source, tmp_path / "set")
    last, states = {}, {}
    for world_size in (1, 3):
        run_ranks(world_size, train_on_ranks, str(tmp_path), task, False, world_size)
        folder = RunFolder(tmp_path / f"{task}-False-{world_size}")
        compact_ledger(folder)
        assert audit_run(folder).passed
        states[world_size] = CheckpointStore(folder.uri).load_latest()
        last[world_size] = [row for row in folder.metrics() if "eval_loss" in row][-1]
    assert states_differ_in(states[1], states[3]) == []
    for name, value in last[1].items():
        if name.startswith("eval_"):
            assert last[3][name] == pytest.approx(value, rel=1e-8), name


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal_lm", "segmentation"])
def test_a_task_has_the_same_bits_on_any_number_of_ranks(task: str, tmp_path: Path) -> None:
    options, _, _ = CASES[task]
    source = lines(tmp_path) + f"?{options}" if options else squares(tmp_path)
    make_shards(source, tmp_path / "set")
    hashes = {n: run_ranks(n, train_on_ranks, str(tmp_path), task, True, n)[0] for n in (1, 2, 3)}
    assert len(set(hashes.values())) == 1, hashes
