"""Batch policies, attacks, analysis and mixing with every task, as the table of docs/tasks.md says."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.cli import main
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import dump_yaml, parse_config
from elastic_kfac.data.dataset import open_datasets
from elastic_kfac.data.shards import make_shards
from elastic_kfac.errors import ConfigError, DataError
from elastic_kfac.training.rank import RankTrainer
from support.policy_table import MODELS, read_table, source_of, values_of

TABLE = read_table()
GROWS = {"batch.max_batch_size": 2, "batch.hessian_samples": 8}
"""The largest batch in multiples of the first one."""
BATCHES: dict[str, dict[str, Any]] = {
    "bl": {},
    "fb": {},
    "gg": {"optimizer.lr_schedule": "step", "optimizer.decay_epochs": [1]},
    "abs": {"batch.patience_epochs": 1},
    "warmup": {"batch.stages": [[1, 2]]},
}
ATTACKS: dict[str, dict[str, Any]] = {
    "fgsm": {"adversarial.attack": "fgsm"},
    "pgd": {"adversarial.attack": "pgd", "adversarial.steps": 2},
    "l2": {"adversarial.attack": "l2"},
    "absa": {"batch.policy": "absa", "adversarial.attack": "fgsm", "batch.patience_epochs": 1},
    "evaluation": {"adversarial.eval_attack": "fgsm"},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Shard sets by task, each made when it is first used."""

    class Sets(dict[str, Path]):
        def __missing__(self, task: str) -> Path:
            folder = tmp_path_factory.mktemp(task)
            make_shards(source_of(task, folder), folder / "set")
            return self.setdefault(task, folder / "set")

    yield Sets()


@contextlib.contextmanager
def trainer(task: str, where: Path, changes: dict[str, Any]) -> Iterator[RankTrainer]:
    config = parse_config(values_of(task, where, changes))
    datasets = open_datasets(config)
    try:
        yield RankTrainer(config, Communicator.solo(), datasets)
    finally:
        datasets.close()


def played(task: str, where: Path, changes: dict[str, Any], epochs: float) -> dict[str, Any]:
    """The sizes of the batches, their losses, and the state at the end."""
    with trainer(task, where, {"train.epochs": epochs, **changes}) as one:
        sizes, losses = [], []
        while not one.finished:
            found = one.step()
            sizes.append(found.totals.count)
            losses.append(found.totals.loss_sum / found.totals.terms)
            if one.epoch_end_is_due:
                one.end_epoch()
        assert all(map(math.isfinite, losses))
        return {"sizes": sizes, "losses": losses, "state": one.capture().sha256()}


def works(task: str, column: str) -> bool:
    return TABLE[task][column] == "yes"


@pytest.mark.parametrize("task", TABLE)
def test_every_batch_policy_enlarges_the_batch(task: str, shards: dict[str, Path]) -> None:
    assert works(task, "batch policies")
    first = values_of(task, shards[task], {})["train"]["global_batch_size"]
    for policy, changes in BATCHES.items():
        given = {**changes, **GROWS, "batch.max_batch_size": 2 * first, "batch.policy": policy}
        if policy == "warmup":
            given["batch.stages"] = [[1, 2 * first]]
        sizes = played(task, shards[task], given, epochs=1.5)["sizes"]
        assert sizes[0] == (2 * first if policy in ("bl", "fb") else first), policy
        assert max(sizes) == 2 * first, policy


@pytest.mark.parametrize("task", TABLE)
def test_attacked_samples_change_what_is_learned(task: str, shards: dict[str, Path]) -> None:
    first = values_of(task, shards[task], {})["train"]["global_batch_size"]
    common = {
        "adversarial.fraction": 0.5,
        "adversarial.radius": 0.1,
        "adversarial.eval_radius": 0.1,
    }
    common |= {**GROWS, "batch.max_batch_size": 2 * first}
    plain = played(task, shards[task], {}, epochs=0.5)["losses"]
    for name, changes in ATTACKS.items():
        if not works(task, "attacks"):
            with pytest.raises(ConfigError, match=r"adversarial\.(eval_)?attack needs one input"):
                played(task, shards[task], common | changes, epochs=0.5)
        elif name == "evaluation":
            with trainer(task, shards[task], common | changes) as one:
                found = one.evaluate()
                assert found.attacked is not None and found.attacked.loss > found.loss
        else:
            # Before the first update, the attacked half has the larger loss.
            assert played(task, shards[task], common | changes, 0.5)["losses"][0] > plain[0], name


@pytest.mark.parametrize("task", TABLE)
def test_analysis_finds_the_top_eigenvalue(task: str, shards: dict[str, Path]) -> None:
    assert works(task, "analysis")
    changes = {"analysis.every_epochs": 1, "analysis.samples": 6, "analysis.lanczos_steps": 4}
    with trainer(task, shards[task], {**changes, "analysis.density_draws": 1}) as one:
        found = one.analyse()
        assert math.isfinite(found["top_eigenvalue"]) and found["top_eigenvalue"] != 0
        assert found["gradient_norm"] > 0


@pytest.mark.parametrize(
    ("column", "changes"),
    [
        ("mixup", {"mixing.mixup": "running"}),
        ("erasing, augmentation", {"mixing.erasing": 1.0}),
        ("erasing, augmentation", {"data.augment": "crop_flip"}),
    ],
    ids=["mixup", "erasing", "augment"],
)
@pytest.mark.parametrize("task", TABLE)
def test_changed_images_change_what_is_learned(
    task: str, column: str, changes: dict[str, Any], shards: dict[str, Path]
) -> None:
    if works(task, column):
        plain = played(task, shards[task], {}, epochs=0.5)
        assert played(task, shards[task], changes, epochs=0.5)["state"] != plain["state"]
    else:
        (key,) = changes
        with pytest.raises((ConfigError, DataError), match=key.replace(".", r"\.")):
            played(task, shards[task], changes, epochs=0.5)


def test_two_stage_detectors_are_refused_by_the_task(
    shards: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Faster and Mask R-CNN return lists of detections where they are not given targets."""
    changes = {"model.name": f"{MODELS}:TwoStage"}
    values = values_of("detection", shards["detection"], changes)
    (tmp_path / "run.yaml").write_text(dump_yaml(values))
    command = ["train", str(tmp_path / "run.yaml"), "--local", "--storage", str(tmp_path / "runs")]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "needs a model with the outputs boxes, scores and anchors" in error
    assert "elastic_kfac.KFAC" in error and not (tmp_path / "runs").exists()
