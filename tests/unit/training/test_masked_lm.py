"""Masked language models from text to loss: what is hidden, what counts, and that it can be learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config, parse_config
from elastic_kfac.data import make_shards
from elastic_kfac.data.dataset import open_datasets
from elastic_kfac.tasks.choice import make_task
from elastic_kfac.training.rank import RankTrainer

LINES = ("abcdefgh", "hgabdc", "ceaf", "bbghhadfce", "fdbhe", "gacegbdf")


class Fixed(nn.Module):
    """Logits that depend on the class alone."""

    def __init__(self, num_outputs: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-1, 2, num_outputs))

    def forward(self, tokens: Tensor, tokens_mask: Tensor | None = None) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


def configured(folder: Path, **changes: dict[str, Any]) -> Config:
    (folder / "lines.txt").write_text("\n".join(LINES * 10))
    make_shards(
        f"text:{folder / 'lines.txt'}?lines=1&tokenizer=characters&test=0.2", folder / "set"
    )
    values: dict[str, dict[str, Any]] = {
        "data": {"shards": str(folder / "set"), "cache_dir": str(folder / "cache")},
        "task": {"name": "masked_lm"},
        "train": {"global_batch_size": 24, "micro_batch_size": 16, "epochs": 1},
    }
    return parse_config({**values, **{k: values.get(k, {}) | v for k, v in changes.items()}})


def test_the_loss_is_the_mean_over_hidden_tokens_of_padded_lines(tmp_path: Path) -> None:
    """Against the frequencies of what is hidden, for logits that no input changes."""
    config = configured(tmp_path, model={"name": f"{__name__}:Fixed"}, kfac={"enabled": False})
    datasets = open_datasets(config)
    trainer = RankTrainer(config, Communicator.solo(), datasets)
    step = trainer.step().totals
    with torch.no_grad():
        trainer.model.logits.copy_(torch.linspace(-1, 2, 9))  # type: ignore[operator, union-attr]
    found = trainer.evaluate()
    assert datasets.evaluation is not None
    batch = make_task(config, datasets.train.columns).prepare(
        datasets.evaluation.read(0, 0, 12), config.train.seed, 0
    )
    hidden = batch.targets[batch.targets != -100]
    wanted = torch.log_softmax(torch.linspace(-1, 2, 9), 0)[hidden]
    assert found.loss == pytest.approx(-float(wanted.mean()), rel=1e-6)
    assert found["accuracy"] == pytest.approx(float((hidden == 8).double().mean()))
    mask = batch.inputs["tokens_mask"]
    shown = batch.inputs["tokens"]
    assert not (batch.targets[~mask] != -100).any() and (batch.targets != -100).any(dim=1).all()
    assert set(shown[mask & (batch.targets != -100)].tolist()) <= set(range(10)) and 9 in shown
    # 15 % of 6.5 tokens: about one in each of the 24 lines, and at least one.
    assert 24 <= step.terms <= 2 * 24
    datasets.close()


@pytest.mark.slow
@pytest.mark.parametrize("kfac", [True, False])
def test_a_small_bert_learns_a_few_lines_by_heart(kfac: bool, tmp_path: Path) -> None:
    size = {"layers": 1, "width": 32, "heads": 4, "tied": False, "initial_std": 0.1}
    config = configured(
        tmp_path,
        model={"name": "bert", "arguments": size},
        train={"global_batch_size": 24, "epochs": 100},
        kfac={"enabled": kfac},
        optimizer={"name": "sgd", "lr": 0.1} if kfac else {"name": "adamw", "lr": 0.01},
    )
    datasets = open_datasets(config)
    trainer = RankTrainer(config, Communicator.solo(), datasets)
    for _ in range(150):
        trainer.step()
    found = trainer.evaluate()
    frequent = np.bincount([ord(c) for line in LINES for c in line]).max() / sum(map(len, LINES))
    assert frequent < 0.2 and found["accuracy"] > 0.9, found["accuracy"]
    datasets.close()
