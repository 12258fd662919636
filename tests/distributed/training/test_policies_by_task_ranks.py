"""Resizes, the reproducible mode and local steps with every task, as the table of docs/tasks.md says."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import parse_config
from elastic_kfac.data.dataset import open_datasets
from elastic_kfac.data.shards import make_shards
from elastic_kfac.state.state import TrainingState
from elastic_kfac.tasks.models import call_model
from elastic_kfac.training.rank import RankTrainer
from support.gloo import run_ranks
from support.policy_table import RUNS, read_table, source_of, values_of
from support.training_problems import states_differ_in

TABLE = read_table()
RANKS = 3
LOCAL: dict[str, Any] = {
    "kfac.enabled": False,
    "optimizer.momentum": 0.0,
    "optimizer.weight_decay": 0.0,
    "elastic.merge_every_steps": 2,
}
COLUMNS = ("resizes", "reproducible", "local steps")


def advanced(
    task: str,
    shards: str,
    changes: Mapping[str, Any],
    world: Communicator,
    steps: int,
    start: TrainingState | None = None,
) -> TrainingState:
    """The state after some steps. Collective."""
    config = parse_config(values_of(task, shards, changes))
    datasets = open_datasets(config)
    try:
        trainer = RankTrainer(config, world, datasets)
        if start is not None:
            trainer.restore(start)
        for _ in range(steps):
            trainer.step()
        return trainer.capture()
    finally:
        datasets.close()


def averaged_by_hand(task: str, shards: str) -> dict[str, Tensor]:
    """The mean over ranks of two plain steps of each on the means over its own terms."""
    config = parse_config(values_of(task, shards, LOCAL))
    datasets = open_datasets(config)
    trainer = RankTrainer(config, Communicator.solo(), datasets)
    learned, passes = trainer._task, trainer._parts.passes
    size, found = config.train.global_batch_size, []
    for rank in range(RANKS):
        model = copy.deepcopy(trainer.model)
        for step in range(2):
            first, last = (step * size + part * size // RANKS for part in (rank, rank + 1))
            batch = passes.preprocess(datasets.train.read(0, first, last - first))
            loss = learned.loss(call_model(model, batch.inputs), batch.targets)
            terms = learned.terms(batch.targets)
            gradients = torch.autograd.grad(loss / terms, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= config.optimizer.lr * gradient
        found.append(model.state_dict())
    datasets.close()
    return {name: sum(one[name] for one in found) / RANKS for name in found[0]}  # type: ignore[misc]


def all_tasks(folder: str) -> dict[tuple[str, str], Any]:
    """What each cell is compared by, on rank 0."""
    world, alone, cells = Communicator.world(), Communicator.solo(), {}
    for task in RUNS:
        shards = f"{folder}/{task}"
        bits = {"elastic.reproducible": True}
        half = advanced(task, shards, {}, world, 2)
        same = advanced(task, shards, bits, world, 2).sha256()
        apart = advanced(task, shards, LOCAL, world, 2)
        newton = advanced(task, shards, {**LOCAL, "elastic.merge": "distnewton"}, world, 2)
        everybody = world.all_gather_object((apart.sha256(), newton.sha256()), tag="test")
        if world.rank == 0:
            cells[task, "resizes"] = states_differ_in(
                advanced(task, shards, {}, alone, 1, half), advanced(task, shards, {}, alone, 3)
            )
            cells[task, "reproducible"] = same, advanced(task, shards, bits, alone, 2).sha256()
            hand = averaged_by_hand(task, shards)
            errors = {
                name: float((apart.tensors[f"model/{name}"] - value).abs().max())
                for name, value in hand.items()
            }
            cells[task, "local steps"] = errors, everybody
        world.barrier(tag="test")
    return cells


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    folder = tmp_path_factory.mktemp("tasks")
    for task in RUNS:
        files = folder / f"files-{task}"
        Path(files).mkdir()
        make_shards(source_of(task, files), folder / task)
    found: dict[tuple[str, str], Any] = run_ranks(RANKS, all_tasks, str(folder), timeout_s=300)[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("task", RUNS)
def test_a_task_on_three_ranks(task: str, column: str, cells: dict[tuple[str, str], Any]) -> None:
    assert TABLE[task][column] == "yes"
    found = cells[task, column]
    if column == "resizes":
        assert found == []
    elif column == "reproducible":
        assert found[0] == found[1]
    else:
        errors, hashes = found
        assert max(errors.values()) < 1e-7, errors  # detection's loss is in float32
        assert len(set(hashes)) == 1 and len({*hashes[0]}) == 2
