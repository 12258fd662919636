"""The configurations of `jobs/configs/`: those of each kind of task train, the full-size ones resolve."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import read_config
from elastic_kfac.data import make_shards
from elastic_kfac.data.dataset import open_datasets
from elastic_kfac.runs.feasibility import Sized
from elastic_kfac.training.rank import RankTrainer

CONFIGS = Path(__file__).parents[3] / "jobs" / "configs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("regression", 1_441),
        ("unet_scenes", 121_123),
        ("detector_scenes", 155_418),
        ("char_gpt", 124_672),
        ("masked_lm", 73_217),
    ],
)
def test_a_few_steps_of_each_task_lower_its_loss(
    name: str, parameters: int, tmp_path: Path
) -> None:
    config = read_config(CONFIGS / f"{name}.yaml", ("train.global_batch_size=16",))
    goal = config.train.goal
    assert goal is not None and config.data.source is not None and config.kfac.enabled
    assert config.elastic.max_workers >= 2
    make_shards(config.data.source, tmp_path)
    shards = (f"data.shards={tmp_path}", "train.global_batch_size=16")
    config = read_config(CONFIGS / f"{name}.yaml", shards)
    datasets = open_datasets(config)
    try:
        trainer = RankTrainer(config, Communicator.solo(), datasets)
        assert sum(parameter.numel() for parameter in trainer.model.parameters()) == parameters
        totals = [trainer.step().totals for _ in range(12)]
        losses = [total.loss_sum / total.count for total in totals]
        assert sum(losses[-3:]) < sum(losses[:3])
        assert trainer.metric == goal.metric and math.isfinite(trainer.evaluate()[goal.metric])
    finally:
        datasets.close()


@pytest.mark.parametrize(
    ("name", "shape", "outputs", "parameters"),
    [
        ("imagenet_resnet50", (3, 224, 224), 1000, 25_557_032),
        ("coco_retinanet", (3, 512, 512), 80, None),
        ("text_gpt2", (1024,), 50_257, 124_439_808),
    ],
)
def test_configurations_of_full_size_resolve(
    name: str, shape: tuple[int, ...], outputs: int, parameters: int | None
) -> None:
    config = read_config(CONFIGS / f"{name}.yaml")
    with (
        torch.device("meta"),
        pytest.warns(UserWarning) if name == "text_gpt2" else contextlib.nullcontext(),
    ):
        sized = Sized.of(config, shape, outputs)
    assert config.train.goal is not None and len(sized.layers) > 20
    assert parameters in (None, sized.parameter_elements)
    plan = sized.plan(8)
    assert plan.world_size == 8
