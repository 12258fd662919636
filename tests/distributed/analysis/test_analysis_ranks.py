"""An analysis has the same numbers on one, two and three ranks, in training and by itself (float64)."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch

from elastic_kfac.analysis.fixed_samples import FixedSamples
from elastic_kfac.analysis.hessian_report import analyse
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import AnalysisConfig
from elastic_kfac.errors import ConfigError
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.tasks.choice import make_task
from elastic_kfac.tasks.models import build_model
from elastic_kfac.tasks.preprocessing import Preprocessor
from elastic_kfac.training.callbacks import KeepGoing
from elastic_kfac.training.loop import run_rank
from support.gloo import run_ranks
from support.training_problems import (
    MemoryDataset,
    RecordingCallback,
    memory_datasets,
    small_config,
)

REQUEST = {
    "top_k": 2,
    "samples": 20,
    "one_samples": 3,
    "trace_draws": 3,
    "density_draws": 1,
    "landscape_points": 3,
    "lanczos_steps": 30,
    "tolerance": 1e-9,
    "batch_size": 5,
}


def numbers(found: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a result but clocks, by its path."""
    flat: dict[str, float] = {}
    for name, value in found.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            flat |= numbers(value, f"{path}.")
        elif isinstance(value, list):
            flat |= numbers({str(i): v for i, v in enumerate(value)}, f"{path}.")
        elif isinstance(value, int | float) and not path.endswith("time_s"):
            flat[path] = float(value)
    return flat


def by_itself(world: Communicator, ranks: int) -> dict[str, Any] | None:
    part = world.subgroup(range(ranks))
    if part is None:
        return None
    config = small_config({"model.name": "support.training_problems:batch_norm_cnn"})
    dataset = MemoryDataset(50)
    model = build_model(config.model, num_outputs=3, input_shape=(1, 4, 4), seed=0)
    request = AnalysisConfig(**REQUEST)
    samples = FixedSamples(
        dataset, Preprocessor(dataset, torch.float64, torch.device("cpu")), request, part
    )
    test = FixedSamples(
        MemoryDataset(20),
        Preprocessor(MemoryDataset(50), torch.float64, torch.device("cpu")),
        request,
        part,
    )
    loss = make_task(config, ()).loss
    landscape = {"train": samples, "test": test}
    return numbers(analyse(model, loss, samples, request, part, landscape=landscape))


def in_training(world: Communicator, ranks: int) -> list[dict[str, Any]]:
    part = world.subgroup(range(ranks))
    if part is None:
        return []
    recorded = RecordingCallback()
    changes = {"analysis.every_epochs": 1, "train.epochs": 2}
    changes |= {"analysis.samples": 20, "analysis.lanczos_steps": 20, "analysis.tolerance": 1e-9}
    with tempfile.TemporaryDirectory() as folder:
        run_rank(
            small_config(changes),
            part,
            store=CheckpointStore(folder),
            callback=recorded,
            control=KeepGoing(),
            datasets=memory_datasets(),
        )
    return [numbers(row["analysis"]) for row in recorded.metric_rows if "analysis" in row]


def no_room_on_rank_1(world: Communicator) -> str:
    config = small_config()
    model = build_model(config.model, num_outputs=3, input_shape=(1, 4, 4), seed=0)
    request = AnalysisConfig(memory_gib=1e-9 if world.rank == 1 else 1.0)
    samples = FixedSamples(
        MemoryDataset(50),
        Preprocessor(MemoryDataset(50), torch.float64, torch.device("cpu")),
        request,
        world,
    )
    with pytest.raises(ConfigError, match="does not fit in memory") as caught:
        analyse(model, make_task(config, ()).loss, samples, request, world)
    return caught.value.line()


def everything() -> tuple[list[Any], list[Any], str]:
    torch.manual_seed(0)
    world = Communicator.world()
    alone = [by_itself(world, ranks) for ranks in (1, 2, 3)]
    trained = [in_training(world, ranks) for ranks in (1, 2, 3)]
    return alone, trained, no_room_on_rank_1(world)


def test_analyses_are_the_same_on_one_two_and_three_ranks() -> None:
    results = run_ranks(3, everything, timeout_s=240)
    (reference, *others), trained, _ = results[0]
    assert reference["spectrum.eigenvalues.1"] and reference["landscape.losses.test.0"]
    assert reference["samples"] == reference["samples_seen"] == 20
    for found in others:
        assert found.keys() == reference.keys()
        for name, expected in reference.items():
            # Residuals at the level of rounding are not numbers of the problem.
            if "residual" not in name:
                assert found[name] == pytest.approx(expected, rel=1e-8, abs=1e-10), name
    first, *rest = trained
    assert len(first) == 2
    for rows in rest:
        for row, expected_row in zip(rows, first, strict=True):
            for name in ("loss", "gradient_norm", "spectrum.eigenvalues.0", "spectrum.smallest"):
                assert row[name] == pytest.approx(expected_row[name], rel=0, abs=1e-10), name
    lines = {line for _, _, line in results}
    assert len(lines) == 1
