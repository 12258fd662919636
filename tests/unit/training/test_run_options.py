"""Clipping, averaged weights, early stopping and hooks, against training written out by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import parse_config
from elastic_kfac.data.batch import Batch
from elastic_kfac.errors import ConfigError
from elastic_kfac.runs.checkpoints import evaluate_run
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.state.state import TrainingState
from elastic_kfac.tasks.models import build_model, create_model
from elastic_kfac.training.evaluation import EarlyStopping
from elastic_kfac.training.hooks import Hooks
from support.training_hooks import Noise
from support.training_problems import (
    MemoryDataset,
    RecordingCallback,
    memory_datasets,
    small_config,
    train_here,
)

SOLO = Communicator.solo()
NOISE = "support.training_hooks:Noise"


def newest(folder: Path) -> TrainingState:
    state = CheckpointStore(folder).load_latest()
    assert state is not None
    return state


def by_hand(
    steps: int,
    *,
    clip: float | None = None,
    decay: float = 0.5,
    transform: Callable[[Batch, int], Batch] = lambda batch, epoch: batch,
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model after textbook SGD, and the average of its weights."""
    model = build_model(small_config().model, num_outputs=3, input_shape=(1, 4, 4), seed=0)
    groups = [
        {"params": [p for n, p in model.named_parameters() if "weight" in n], "weight_decay": 1e-3},
        {"params": [p for n, p in model.named_parameters() if "bias" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    dataset, epoch, first = MemoryDataset(50), 0, 0
    for _ in range(steps):
        samples = transform(dataset.read(epoch, first, min(16, 50 - first)), epoch)
        optimizer.zero_grad()
        F.cross_entropy(model(samples.inputs), samples.targets).backward()
        if clip is not None:
            norm = torch.cat(
                [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            ).norm()
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad *= min(1.0, clip / float(norm))
        optimizer.step()
        for name, parameter in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
        first += 16
        if first >= 50:
            epoch, first = epoch + 1, 0
    return model, average


def assert_close(
    ours: dict[str, Any], oracle: dict[str, torch.Tensor], atol: float = 1e-12
) -> None:
    assert ours.keys() == oracle.keys()
    for name, tensor in oracle.items():
        assert torch.allclose(ours[name], tensor, rtol=0, atol=atol), name


def test_clipped_trajectory_equals_one_by_hand(tmp_path: Path) -> None:
    train_here(tmp_path, {"optimizer.clip_grad_norm": 0.3, "train.micro_batch_size": 5}, SOLO)
    model, _ = by_hand(12, clip=0.3)
    # torch divides by the norm plus 1e-6.
    assert_close(newest(tmp_path).model_tensors(), model.state_dict(), atol=1e-5)
    free, _ = by_hand(12)
    assert not torch.allclose(free.state_dict()["3.bias"], model.state_dict()["3.bias"], atol=1e-4)


def test_average_is_kept_evaluated_and_resumed(tmp_path: Path) -> None:
    changes = {"optimizer.average_decay": 0.5}
    train_here(tmp_path / "a", changes, SOLO)
    model, average = by_hand(12)
    state = newest(tmp_path / "a")
    assert_close(state.model_tensors(), model.state_dict())
    assert_close(state.part("average"), average)

    RunFolder(tmp_path / "a").write_config(small_config(changes))
    _, found = evaluate_run(RunFolder.existing(str(tmp_path / "a")), datasets=memory_datasets())
    model.load_state_dict(average)
    held_out = MemoryDataset(20).read(0, 0, 20)
    loss = F.cross_entropy(model(held_out.inputs), held_out.targets).item()
    assert found.loss == pytest.approx(loss, abs=1e-12)

    seen = RecordingCallback()
    train_here(tmp_path / "b", changes, SOLO, stop_at=5, callback=seen)
    resumed = train_here(tmp_path / "b", changes, SOLO, callback=seen)
    assert resumed.state_sha256 == state.sha256()
    last = [row["eval_loss"] for row in seen.metric_rows if "eval_loss" in row][-1]
    assert last == pytest.approx(loss, abs=1e-12)


@pytest.mark.parametrize(
    ("direction", "values", "over"),
    [
        ("min", [3.0, 2.0, 1.95, 1.8], [False, False, False, False]),
        ("min", [3.0, 3.0, 2.95], [False, False, True]),
        ("max", [0.5, 0.7, float("nan"), 0.6], [False, False, False, True]),
    ],
)
def test_patience(direction: Any, values: list[float], over: list[bool]) -> None:
    rule = parse_config(
        {"train": {"early_stop": {"patience": 2, "min_delta": 0.1}}}
    ).train.early_stop
    assert rule is not None
    stopping, found = EarlyStopping(rule, direction), []
    for value in values:
        stopping.took(value)
        found.append(stopping.is_over)
        again = EarlyStopping(rule, direction)
        again.load_state_dict(stopping.state_dict())
        assert again == stopping
    assert found == over


def test_run_that_no_longer_improves_ends_and_stays_ended(tmp_path: Path) -> None:
    seen = RecordingCallback()
    stop = {"metric": "accuracy", "patience": 2}
    # So small a rate changes no prediction.
    changes = {"train.early_stop": stop, "optimizer.lr": 1e-9, "train.epochs": 9}
    ended = train_here(tmp_path, changes, SOLO, callback=seen)
    assert (ended.status, ended.fractional_epoch) == ("finished", 3.0)
    assert [row["step"] for row in seen.events if row["kind"] == "stopped_early"] == [12]
    again = train_here(tmp_path, changes, SOLO)
    assert (again.status, again.progress.step) == ("finished", 12)


def test_hook_transforms_every_sample_and_is_resumed(tmp_path: Path) -> None:
    changes = {"train.hooks": [NOISE]}
    train_here(tmp_path / "a", changes, SOLO)
    model, _ = by_hand(12, transform=Noise(small_config(changes)).transform)
    assert_close(newest(tmp_path / "a").model_tensors(), model.state_dict())
    train_here(tmp_path / "b", changes, SOLO, stop_at=7)
    train_here(tmp_path / "b", changes, SOLO)
    state = newest(tmp_path / "b")
    assert state.part("hooks") == {"0 Noise": {"committed": 12}}
    assert state.sha256() == newest(tmp_path / "a").sha256()


def test_hook_of_the_documentation_treats_each_sample_by_itself() -> None:
    text = (Path(__file__).parents[3] / "docs" / "hooks.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {}
    exec(code[1], scope)
    hook, samples = scope["Brightness"](small_config()), MemoryDataset(9).read(0, 0, 9)
    Hooks([hook]).check(samples)
    change = hook.transform(samples, 0).inputs - samples.inputs
    assert float(change.abs().max()) <= 0.2
    assert not torch.equal(change, hook.transform(samples, 1).inputs - samples.inputs)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train.hooks": ["support.training_hooks:Centred"]}, "depends on the samples beside it"),
        ({"train.hooks": ["support.training_hooks:no_hook"]}, "returned no elastic_kfac"),
        ({"train.hooks": ["support.training_hooks:Nois"]}, "has no callable Nois"),
        ({"train.early_stop": {"metric": "f1"}}, "train.early_stop.metric=f1"),
        (
            {"optimizer.average_decay": 0.9, "elastic.merge_every_steps": 2},
            "optimizer.average_decay needs elastic.merge_every_steps=1",
        ),
        (
            {"optimizer.clip_grad_norm": 1.0, "optimizer.name": "sharded_kfac"},
            "optimizer.clip_grad_norm needs optimizer.name other than sharded_kfac",
        ),
        (
            {
                "optimizer.clip_grad_norm": 1.0,
                "kfac.enabled": True,
                "kfac.damping": {"rule": "levenberg_marquardt", "initial": 0.1},
            },
            "compares a step with the whole gradient",
        ),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        train_here(tmp_path, changes, SOLO)
    assert says in refused.value.line()


def test_models_of_torchvision() -> None:
    model = create_model("torchvision:mobilenet_v3_small", 7, (3, 32, 32), dropout=0.1)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    for name, says in [
        ("torchvision:resnet19", "did you mean torchvision:resnet18?"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no image classifier"),
    ]:
        with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
            create_model(name, 7, (3, 32, 32))
    with pytest.raises(ConfigError, match="3 channels"):
        create_model("torchvision:resnet18", 7, (1, 32, 32))
    with pytest.raises(ConfigError, match="needs images"):
        create_model("torchvision:resnet18", 7, (5,))


def test_models_of_timm() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    model = create_model("timm:vit_tiny_patch16_224", 7, (1, 32, 32), img_size=32)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(ConfigError, match="did you mean timm:resnet18"):
        create_model("timm:resnet1", 7, (3, 32, 32))
