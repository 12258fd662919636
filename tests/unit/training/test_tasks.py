"""Every task from its source to the report, and its metrics against torchmetrics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from elastic_kfac.analysis.hessian import Hessian
from elastic_kfac.cli import main
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import dump_yaml, parse_config
from elastic_kfac.data.columns import Column
from elastic_kfac.data.dataset import open_datasets, open_split
from elastic_kfac.data.shards import make_shards
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.tasks.detection import mean_average_precision
from elastic_kfac.tasks.language import CausalLM, MaskedLM, SequenceClassification
from elastic_kfac.tasks.models import call_model
from elastic_kfac.tasks.preprocessing import Preprocessor
from elastic_kfac.tasks.regression import Regression
from elastic_kfac.tasks.segmentation import Segmentation
from elastic_kfac.training.step import StepTrainer
from support.task_sources import MODELS, letters, numbers, objects, own, prose, reviews, scenes

CASES: dict[str, tuple[Callable[[Path], str], dict[str, Any], str, float]] = {
    "regression": (numbers, {"model.name": "mlp"}, "r2", 0.9),
    "causal_lm": (prose, {"model.name": f"{MODELS}:NextToken"}, "accuracy", 0.3),
    "masked_lm": (letters, {"model.name": f"{MODELS}:NextToken"}, "accuracy", 0.15),
    "sequence_classification": (reviews, {"model.name": f"{MODELS}:BagOfTokens"}, "f1", 0.9),
    "segmentation": (scenes, {"model.name": f"{MODELS}:pixel_network"}, "miou", 0.7),
    "detection": (
        objects,
        {"model.name": f"{MODELS}:Anchors", "train.epochs": 16, "optimizer.momentum": 0.9},
        "map50",
        0.5,
    ),
    "autoencoding": (scenes, {"model.name": f"{MODELS}:autoencoder"}, "mse", 3.0),
    f"{MODELS}:AbsoluteError": (own, {"model.name": f"{MODELS}:TwoInputs"}, "close", 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", CASES)
def test_task_goes_from_its_source_to_the_report(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, changes, metric, expected = CASES[task]
    assert (
        main(["shards", "make", "--source", source(tmp_path), "--out", str(tmp_path / "set")]) == 0
    )
    assert main(["shards", "verify", str(tmp_path / "set")]) == 0
    values: dict[str, Any] = {
        "data": {"shards": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")},
        "task": {"name": task},
        "train": {"epochs": 6, "global_batch_size": 16, "micro_batch_size": 10},
    }
    for path, value in changes.items():
        section, key = path.split(".")
        values.setdefault(section, {})[key] = value
    (tmp_path / "run.yaml").write_text(dump_yaml(values))
    command = ["train", str(tmp_path / "run.yaml"), "--local", "--name", "run"]
    assert main([*command, "--storage", str(tmp_path / "runs")]) == 0
    folder = RunFolder(tmp_path / "runs" / "run")
    last = [row for row in folder.metrics() if f"eval_{metric}" in row][-1]
    better = (
        last[f"eval_{metric}"] < expected if metric == "mse" else last[f"eval_{metric}"] > expected
    )
    assert better, last
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "runs" / "run")]) == 0
    assert f"loss {last['eval_loss']:.4f}" in capsys.readouterr().out
    assert main(["audit", str(tmp_path / "runs" / "run")]) == 0
    assert main(["report", str(tmp_path / "runs" / "run")]) == 0


def metrics_in_parts(task: Any, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """What an evaluation of two unequal parts reports."""
    sums, loss, terms = None, 0.0, 0
    for part in (slice(0, 3), slice(3, None)):
        found = task.sums(outputs[part], targets[part])
        sums = found if sums is None else sums + found
        loss += float(task.loss(outputs[part], targets[part]))
        terms += task.terms(targets[part])
    return task.values(sums, terms, loss / terms)


def test_regression_metrics_are_those_of_torchmetrics() -> None:
    import torchmetrics

    column = Column("y", "tensor", "target", dtype="float32", shape=(1,), mean=(5.0,), std=(2.0,))
    torch.manual_seed(0)
    outputs, targets = torch.randn(9, 1), 5 + 2 * torch.randn(9, 1)
    found = metrics_in_parts(Regression((column,)), outputs, targets)
    predicted = 5 + 2 * outputs
    for name, metric in (
        ("rmse", torchmetrics.MeanSquaredError(squared=False)),
        ("mae", torchmetrics.MeanAbsoluteError()),
        ("r2", torchmetrics.R2Score()),
    ):
        metric.update(predicted[:, 0], targets[:, 0])
        assert found[name] == pytest.approx(float(metric.compute()), rel=1e-5)


def test_language_metrics_are_those_of_torchmetrics() -> None:
    from torchmetrics.text import Perplexity

    column = Column(
        "tokens", "tokens", "input", vocabulary=11, shortest=3, longest=7, bytes_per_token=2.5
    )
    torch.manual_seed(0)
    outputs, targets = torch.randn(6, 7, 11), torch.randint(0, 11, (6, 7))
    targets[torch.rand(6, 7) < 0.3] = -100
    metric = Perplexity(ignore_index=-100)
    metric.update(outputs, targets)
    found = metrics_in_parts(CausalLM((column,)), outputs, targets)
    assert found["perplexity"] == pytest.approx(float(metric.compute()), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(math.log2(found["perplexity"]) / 2.5, rel=1e-9)


def test_class_metrics_are_those_of_torchmetrics() -> None:
    from torchmetrics.classification import MulticlassF1Score, MulticlassJaccardIndex

    torch.manual_seed(0)
    names = ("a", "b", "c", "d")
    mask = Column("m", "mask", "target", class_names=names)
    outputs, targets = torch.randn(6, 4, 5, 5), torch.randint(0, 4, (6, 5, 5))
    targets[torch.rand(6, 5, 5) < 0.2] = 255
    found = metrics_in_parts(Segmentation((mask,)), outputs, targets)
    for name, kind in (("miou", MulticlassJaccardIndex), ("dice", MulticlassF1Score)):
        metric = kind(4, ignore_index=255)
        metric.update(outputs.argmax(1), targets)
        assert found[name] == pytest.approx(float(metric.compute()), rel=1e-5)
    tokens = Column("t", "tokens", "input", vocabulary=5, longest=3)
    label = Column("l", "class", "target", class_names=names)
    scores, classes = torch.randn(20, 4), torch.randint(0, 4, (20,))
    one = MulticlassF1Score(4)
    one.update(scores, classes)
    found = metrics_in_parts(SequenceClassification((tokens, label)), scores, classes)
    assert found["f1"] == pytest.approx(float(one.compute()), rel=1e-5)


def test_masked_tokens_depend_on_seed_epoch_and_sample_alone() -> None:
    from elastic_kfac.data.batch import Batch

    column = Column("tokens", "tokens", "input", vocabulary=50, longest=40, shortest=40)
    task = MaskedLM((column,), probability=0.3)
    tokens = torch.randint(0, 50, (8, 40))
    ids = np.arange(100, 108, dtype=np.uint64)
    whole = task.prepare(Batch(tokens, tokens, ids, torch.ones(8)), 3, 1)
    part = task.prepare(Batch(tokens[5:], tokens[5:], ids[5:], torch.ones(3)), 3, 1)
    assert torch.equal(whole.inputs[5:], part.inputs) and torch.equal(
        whole.targets[5:], part.targets
    )
    hidden = whole.targets != -100
    assert torch.equal(whole.targets[hidden], tokens[hidden])
    assert torch.equal(whole.inputs[~hidden], tokens[~hidden])
    assert 0.2 < float(hidden.double().mean()) < 0.4 and hidden.any(dim=1).all()
    assert 0.65 < float((whole.inputs[hidden] == 50).double().mean()) < 0.95
    other = task.prepare(Batch(tokens, tokens, ids, torch.ones(8)), 3, 2)
    assert not torch.equal(other.targets, whole.targets)


def test_average_precision_counts_each_box_once() -> None:
    """Two boxes of one class; a hit, a second hit of the same box, then the other box: the precisions
    at the recalls 1/2 and 1 are 1 and 2/3."""
    truth = np.array([[0, 0, 10, 10, 0], [20, 20, 40, 40, 0]], dtype=np.float32)
    predicted = {
        "boxes": np.array([[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 40, 40]], dtype=np.float32),
        "scores": np.array([0.9, 0.8, 0.7], dtype=np.float32),
        "classes": np.zeros(3, dtype=np.int64),
    }
    found = mean_average_precision([(predicted, truth)], classes=1)
    # COCO interpolates at 101 recalls: 0 to 0.50 have precision 1, the other 50 have 2/3.
    assert found["map50"] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-6)
    assert found["map"] == pytest.approx(found["map50"], abs=1e-6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.augment", "crop_flip"),
        ("data.image_size", 32),
        ("mixing.erasing", 0.5),
        ("adversarial.attack", "fgsm"),
        ("adversarial.eval_attack", "fgsm"),
    ],
)
def test_settings_of_images_are_refused_for_tokens(
    key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(prose(tmp_path), tmp_path / "set")
    values = {
        "data": {"shards": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")},
        "task": {"name": "causal_lm"},
        "model": {"name": f"{MODELS}:NextToken"},
    }
    (tmp_path / "run.yaml").write_text(dump_yaml(values))
    command = ["train", str(tmp_path / "run.yaml"), "--local", "--storage", str(tmp_path / "runs")]
    assert main([*command, "--set", f"{key}={value}"]) == 2
    assert f"{key} " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("task", ["segmentation", "detection", "regression", "classification"])
def test_task_without_its_target_is_refused(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(prose(tmp_path), tmp_path / "set")
    command = ["train", "jobs/configs/digits.yaml", "--local", "--storage", str(tmp_path / "runs")]
    given = [f"data.shards={tmp_path / 'set'}", "data.source=null", f"task.name={task}"]
    assert main([*command, *(part for each in given for part in ("--set", each))]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"task.name={task} needs" in error and "tokens (input: tokens)" in error


def test_hessian_of_tokens_is_that_of_the_mean_over_tokens() -> None:
    """Two sequences of unlike numbers of tokens against autograd's own second derivative."""
    column = Column("tokens", "tokens", "input", vocabulary=3, shortest=2, longest=4)
    task = CausalLM((column,))
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 3).double()
    inputs, targets = (
        torch.randn(2, 4, 2).double(),
        torch.tensor([[0, 2, 1, 1], [2, -100, -100, 0]]),
    )
    operator = Hessian(model, task.loss, [(inputs, targets)], terms=task.terms)
    shapes = [p.shape for p in model.parameters()]

    def mean(flat: torch.Tensor) -> torch.Tensor:
        weight, bias = (v.view(s) for v, s in zip(flat.split([6, 3]), shapes, strict=True))
        return torch.nn.functional.cross_entropy(
            (inputs @ weight.T + bias).flatten(0, 1), targets.flatten(), ignore_index=-100
        )

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    dense = torch.autograd.functional.hessian(mean, flat)
    found = torch.stack([operator.product(row) for row in torch.eye(9, dtype=torch.float64)])
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-12)


def test_factors_of_padded_tokens_are_means_over_the_real_ones(tmp_path: Path) -> None:
    """K-FAC inside a run, in unequal micro-batches, against sums over the tokens of the batch."""
    texts = ["a" * n + "bcd" for n in range(1, 30)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet")
    make_shards(f"text:{tmp_path / 't.parquet'}?lines=1&test=0.2", tmp_path / "set")
    values = {
        "data": {"shards": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")},
        "task": {"name": "causal_lm"},
        "model": {"name": f"{MODELS}:next_token64"},
        "train": {"global_batch_size": 16, "micro_batch_size": 5},
        "kfac": {"factor_decay": 0.0, "fisher": "empirical"},
    }
    config = parse_config(values)
    datasets = open_datasets(config)
    trainer = StepTrainer(config, Communicator.solo(), datasets)
    batch = trainer._parts.passes.preprocess(datasets.train.read(0, 0, 16))
    model, task = copy.deepcopy(trainer.model), trainer._parts.task
    seen: dict[str, torch.Tensor] = {}
    head = model.head
    head.register_forward_hook(lambda layer, given, out: seen.update(a=given[0], out=out))
    outputs = call_model(model, batch.inputs)
    (g,) = torch.autograd.grad(task.loss(outputs, batch.targets), seen["out"])
    real = batch.targets != -100
    assert 0.2 < float(real.double().mean()) < 0.9
    inputs = torch.cat([seen["a"][real], torch.ones(int(real.sum()), 1).double()], dim=1)
    trainer.step()
    assert trainer.kfac is not None
    found = trainer.kfac.factors()["head"]
    count = int(real.sum())
    torch.testing.assert_close(found["A"], (inputs.T @ inputs / count).detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found["G"], g[real].T @ g[real] / count, rtol=0, atol=1e-12)
    datasets.close()


def test_a_pass_is_as_long_as_its_longest_sequence(tmp_path: Path) -> None:
    texts = ["a" * n for n in (3, 4, 5, 30)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet")
    make_shards(f"text:{tmp_path / 't.parquet'}?lines=1&test=0.25", tmp_path / "set")
    values = {"data": {"shards": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}}
    with open_split(parse_config(values), "train") as opened:
        preprocess = Preprocessor(opened, torch.float32, torch.device("cpu"))
        whole = opened.read(0, 0, 3)
        assert whole.inputs["tokens"].shape == (3, 30)
        for place in range(3):
            part = whole.part(slice(place, place + 1))
            length = int(part.inputs["tokens_mask"].sum())
            batch = preprocess(part)
            assert batch.inputs["tokens"].shape == batch.inputs["tokens_mask"].shape == (1, length)
            assert bool(batch.inputs["tokens_mask"].all())
        assert preprocess.empty().inputs["tokens"].shape[0] == 0
