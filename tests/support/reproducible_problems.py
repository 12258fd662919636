"""A problem that shows every way in which bits can depend on the world size, and worlds to run it in."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from elastic_kfac.config import Config
from elastic_kfac.errors import CommunicationError
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.training.callbacks import Callback, KeepGoing
from elastic_kfac.training.loop import Outcome, run_rank
from elastic_kfac.training.membership import leave, regroup
from support.gloo import disband, wait_for
from support.training_problems import RecordingCallback, StopAt, memory_datasets, small_config

Segment = tuple[int, int | None]
"""World size, and after how many steps it parks (None: it goes on to the end)."""


def dropout_net(num_classes: int, image_shape: tuple[int, int, int], **_: Any) -> nn.Module:
    """float32: convolution, BatchNorm, dropout, and a wide linear layer."""
    return nn.Sequential(
        nn.Conv2d(image_shape[0], 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * image_shape[1] * image_shape[2], 33),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(33, num_classes),
    )


REPRODUCIBLE: dict[str, Any] = {
    "model.name": "support.reproducible_problems:dropout_net",
    "train.global_batch_size": 22,
    "train.epochs": 4,
    "kfac.enabled": True,
    "kfac.damping": 0.01,
    "kfac.factor_update_steps": 2,
    "kfac.inverse_update_steps": 5,
    "elastic.reproducible": True,
}
"""Batches of 22 in 8 shards: sizes 3 and 2; the last batch of an epoch has 6, two shards none."""


def reproducible_config(changes: dict[str, Any] | None = None) -> Config:
    """`REPRODUCIBLE` with changes."""
    return small_config({**REPRODUCIBLE, **(changes or {})})


def train_part(
    config: Config,
    folder: str,
    world: tuple[int, int, int, dist.Store],
    steps: int | None,
    callback: Callback | None = None,
) -> Outcome:
    """One world (generation, rank, size, store) from the newest checkpoint on; does not leave it."""
    return run_rank(
        config,
        regroup(*world, timeout_s=60),
        store=CheckpointStore(folder),
        callback=callback or RecordingCallback(),
        control=KeepGoing() if steps is None else StopAt(steps),
        datasets=memory_datasets(),
    )


def random_schedule(seed: int, most: int) -> list[Segment]:
    """Worlds of 1 … `most` ranks that park after one to four steps; the last one goes on."""
    choose = random.Random(seed)
    parts: list[Segment] = [(choose.randint(1, most), choose.randint(1, 4)) for _ in range(3)]
    return [*parts, (choose.randint(1, most), None)]


def play_schedules(folder: str, schedules: dict[str, tuple[dict[str, Any], list[Segment]]]) -> None:
    """Plays schedules one after the other with the ranks of the present group as a pool."""
    slot = dist.get_rank()
    store = disband()
    generation = 0
    for name, (changes, segments) in schedules.items():
        for world_size, steps in segments:
            generation += 1
            if slot < world_size:
                world = (generation, slot, world_size, store)
                train_part(reproducible_config(changes), f"{folder}/{name}", world, steps)
                leave()
            if slot == 0:
                store.set(f"played/{generation}", "")
            wait_for(store, [f"played/{generation}"])


def play_kill(folder: str, callback: Callback, victim: int) -> str:
    """Three ranks until one is killed; the survivors go on as two, from the newest checkpoint."""
    slot = dist.get_rank()
    store = disband()
    config = reproducible_config({"elastic.snapshot_interval_s": 1e-9})
    said = ""
    try:
        train_part(config, folder, (1, slot, 3, store), None, callback)
    except CommunicationError as error:
        said = error.line()
    # Outside of the handler: its traceback holds on to the group, whose peers would wait for it.
    leave()
    rank = slot - (slot > victim)
    train_part(config, folder, (2, rank, 2, store), None)
    leave()
    return said


def final_sha256(folder: Path) -> str:
    """Of the newest checkpoint, which must be the end of the run."""
    state = CheckpointStore(folder).load_latest()
    assert state is not None and state.progress.epoch == 4 and state.progress.step == 12
    assert all(torch.isfinite(t).all() for t in state.tensors.values() if t.is_floating_point())
    return state.sha256()
