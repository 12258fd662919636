"""The example of a person's own loop: parked and resumed on other ranks, it ends like one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from elastic_kfac.elastic import CheckpointStore, ElasticState
from elastic_kfac.errors import UsageError
from support.gloo import run_ranks
from support.training_problems import states_differ_in

EXAMPLE = Path(__file__).parents[3] / "docs/examples/own_loop.py"


def run_example(folder: str, most_steps: int) -> str:
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sha256 = module.train(folder, most_steps)
    assert isinstance(sha256, str)
    return sha256


def test_own_loop_stopped_at_two_ranks_and_resumed_at_one_equals_one_process(
    tmp_path: Path,
) -> None:
    run_example(str(tmp_path / "alone"), 10**9)
    hashes = run_ranks(2, run_example, str(tmp_path / "elastic"), 10)
    assert hashes[0] == hashes[1]
    run_example(str(tmp_path / "elastic"), 10**9)
    alone, elastic = (CheckpointStore(tmp_path / n).load_latest() for n in ("alone", "elastic"))
    assert alone is not None and elastic is not None
    assert alone.progress.step == elastic.progress.step == 20
    assert elastic.ledger.world_sizes == (2, 1)
    assert states_differ_in(alone, elastic) == []


def test_batch_that_is_not_committed_is_an_error_and_not_left_out(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = ElasticState(model, optimizer, folder=tmp_path).batches(10, 4, 1)
    assert next(batches) == (0, 0, 4)
    with pytest.raises(UsageError, match="was not committed"):
        next(batches)
