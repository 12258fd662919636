"""Real shards, real augmentation-free stream, K-FAC, two ranks and then one: audited from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import parse_config
from elastic_kfac.data.shards import make_shards
from elastic_kfac.runs.audit import audit_run
from elastic_kfac.runs.checkpoints import evaluate_run
from elastic_kfac.runs.final_record import compact_ledger, read_ledger
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.ledger import to_parquet
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.training.callbacks import FolderWriter, KeepGoing
from elastic_kfac.training.loop import Outcome, run_rank
from support.gloo import run_ranks
from support.training_problems import StopAt


def values(root: Path) -> dict[str, Any]:
    return {
        "data": {"shards": str(root / "digits"), "cache_dir": str(root / "cache")},
        "model": {"arguments": {"width": 8}},
        "train": {"epochs": 2, "global_batch_size": 128},
        "optimizer": {"lr": 0.05},
        "kfac": {"damping": 0.01, "kl_clip": 1e-4},
    }


def train(root: str, stop_at: int | None) -> Outcome:
    config = parse_config(values(Path(root)))
    folder = RunFolder(Path(root) / "run")
    return run_rank(
        config,
        Communicator.world(),
        store=CheckpointStore(folder.uri),
        callback=FolderWriter(folder),
        control=KeepGoing() if stop_at is None else StopAt(stop_at),
    )


def test_digits_at_two_ranks_then_one_passes_the_audit_and_learns(tmp_path: Path) -> None:
    make_shards("digits", tmp_path / "digits")
    folder = RunFolder(tmp_path / "run")
    folder.write_config(parse_config(values(tmp_path)))
    first = run_ranks(2, train, str(tmp_path), 9)
    assert {outcome.progress.step for outcome in first} == {9}
    unfinished = audit_run(folder)
    assert unfinished.passed and unfinished.steps == 9 and unfinished.complete_epochs == 0
    outcome = train(str(tmp_path), None)
    assert (outcome.status, outcome.world_sizes) == ("finished", (2, 1))
    assert compact_ledger(folder) == 24
    report = audit_run(folder)
    assert report.passed, report.line()
    assert (report.complete_epochs, report.world_sizes) == (2, (2, 1))
    rows = [row for row in folder.metrics() if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert rows[-1]["loss"] < rows[0]["loss"]
    _, evaluation = evaluate_run(folder)
    assert evaluation.count == 359
    last = [row["eval_accuracy"] for row in folder.metrics() if "eval_accuracy" in row][-1]
    assert evaluation["accuracy"] == last > 0.5
    # A ledger that lies is found: one sample more or less in one step.
    ledger = read_ledger(folder)
    ledger["id_hash"][11] += 1
    folder.storage.write("ledger.parquet", to_parquet(ledger))
    assert "step 12" in audit_run(folder).line()
