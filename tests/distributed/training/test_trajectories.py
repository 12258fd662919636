"""Short runs of every way to train, pinned bit for bit: a refactor that changes a bit is seen here.

`trajectories.json` is re-recorded only in a commit that says why:

    .venv/bin/python tests/distributed/training/test_trajectories.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[3] / name) for name in ("platform", "tests")]

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import parse_config
from elastic_kfac.data.shards import make_shards
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import tensors_sha256
from elastic_kfac.training.callbacks import KeepGoing
from elastic_kfac.training.loop import run_rank
from elastic_kfac.training.sync.reproducible import machine_type
from support.gloo import run_ranks
from support.training_problems import KFAC, RecordingCallback, memory_datasets, small_config

RECORD = Path(__file__).with_name("trajectories.json")
SHORT: dict[str, Any] = {
    "model": {"arguments": {"width": 4}},
    "train": {"epochs": 0.5, "global_batch_size": 64},
}
DIGITS: dict[str, dict[str, Any]] = {
    "digits_reproducible": {
        **SHORT,
        "optimizer": {"lr": 0.05},
        "kfac": {
            "damping": 0.01,
            "kl_clip": 1e-4,
            "factor_update_steps": 1,
            "inverse_update_steps": 5,
        },
        "elastic": {"reproducible": True},
    },
    "digits_defaults": SHORT,
}
APART: dict[str, Any] = {"optimizer.momentum": 0.5, "elastic.merge_every_steps": 3}
SMALL: dict[str, dict[str, Any]] = {
    "kfac_mem_opt": {**KFAC, "kfac.grad_worker_frac": 0.34, "kfac.method": "inverse"},
    "sharded_kfac": {
        "optimizer.name": "sharded_kfac",
        "optimizer.weight_decay": 0.0,
        "kfac.damping": 0.01,
        "kfac.factor_update_steps": 1,
        "kfac.kl_clip": None,
    },
    "local_sgd_distnewton": {
        **APART,
        "elastic.merge": "distnewton",
        "distnewton.mode": "abs",
        "distnewton.lr": 1.0,
        "distnewton.gradient_lr": 0.05,
    },
    "abs": {
        "batch.policy": "abs",
        "batch.max_batch_size": 32,
        "batch.patience_epochs": 1,
        "batch.hessian_samples": 23,
        "optimizer.lr": 0.01,
    },
}

Trajectory = dict[str, Any]


def _train(folder: Path, case: str, root: Path) -> Trajectory:
    recorded = RecordingCallback()
    digits = case in DIGITS
    data = {"shards": str(root / "digits"), "cache_dir": str(root / "cache")}
    run_rank(
        parse_config({**DIGITS[case], "data": data}) if digits else small_config(SMALL[case]),
        Communicator.world(),
        store=CheckpointStore(folder),
        callback=recorded,
        control=KeepGoing(),
        datasets=None if digits else memory_datasets(),
    )
    state = CheckpointStore(folder).load_latest()
    assert state is not None
    return {
        "losses": [float(row["loss"]) for row in recorded.metric_rows if "loss" in row],
        "model_sha256": tensors_sha256(state.model_tensors()),
        "state_sha256": state.sha256(),
    }


def _train_on_rank(folder: str, cases: list[str]) -> dict[str, Trajectory]:
    rank = Communicator.world().rank
    found = {}
    for case in cases:
        trajectory = _train(
            Path(folder) / str(Communicator.world().world_size) / case, case, Path(folder)
        )
        if rank == 0:
            found[case] = trajectory
    return found


def _play(root: Path) -> dict[str, Trajectory]:
    make_shards("digits", root / "digits")
    played = {}
    for world_size, cases in (
        (1, [*DIGITS]),
        (2, [*DIGITS, "abs"]),
        (3, [*DIGITS, "kfac_mem_opt", "sharded_kfac", "local_sgd_distnewton"]),
    ):
        first = run_ranks(world_size, _train_on_rank, str(root), cases)[0]
        played |= {f"{case} on {world_size}": value for case, value in first.items()}
    return played


def _conditions() -> dict[str, str]:
    return {"torch": torch.__version__, "machine": machine_type(torch.device("cpu"))}


def _record(path: Path = RECORD) -> None:
    with tempfile.TemporaryDirectory() as folder:
        played = _play(Path(folder))
    text = json.dumps({"conditions": _conditions(), "trajectories": played}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trajectory]:
    return _play(tmp_path_factory.mktemp("trajectories"))


def test_trajectories_are_those_of_the_record(played: dict[str, Trajectory]) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert set(played) == set(record["trajectories"])
    for name, expected in record["trajectories"].items():
        assert played[name]["losses"] == pytest.approx(expected["losses"], rel=1e-4), name
    # Bits are promised on machines of one type only; elsewhere the losses above stand for them.
    if record["conditions"] == _conditions():
        assert played == record["trajectories"]


def test_reproducible_digits_have_the_same_bits_on_one_two_and_three_ranks(
    played: dict[str, Trajectory],
) -> None:
    runs = [played[f"digits_reproducible on {world_size}"] for world_size in (1, 2, 3)]
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0]["losses"]) == 12 and runs[0]["losses"][-1] < runs[0]["losses"][0]


def test_digits_with_the_products_defaults_train_alike_on_one_two_and_three_ranks(
    played: dict[str, Trajectory],
) -> None:
    assert parse_config(SHORT).kfac.trust_region == "adaptive"
    runs = [played[f"digits_defaults on {world_size}"]["losses"] for world_size in (1, 2, 3)]
    for losses in runs:
        assert losses == pytest.approx(runs[0], rel=1e-3)
    assert len(runs[0]) == 12 and runs[0][-1] < runs[0][0]


if __name__ == "__main__":
    _record()
