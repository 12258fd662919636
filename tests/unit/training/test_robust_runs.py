"""Attacks in runs: evaluated, refused before anything starts, and paid for in the books."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.cli import main
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import read_config
from elastic_kfac.runs.checkpoints import evaluate_run
from elastic_kfac.runs.final_record import result_row
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.tasks.attacks import check_attacks
from elastic_kfac.training.callbacks import FolderWriter, KeepGoing
from elastic_kfac.training.loop import run_rank
from support.training_problems import RecordingCallback, memory_datasets, small_config

DIGITS = Path(__file__).parents[3] / "jobs" / "configs" / "digits.yaml"

ABSA: dict[str, Any] = {
    "batch.policy": "absa",
    "batch.max_batch_size": 64,
    "batch.patience_epochs": 1,
    "batch.eigenvalue": "kfac",
    "batch.report_both": True,
    "batch.samples_per_worker": 16,
    "elastic.batch_policy": "abs",
    "elastic.max_workers": 3,
    "kfac.enabled": True,
    "kfac.damping": 0.05,
    "train.epochs": 5,
    "optimizer.lr": 0.01,
    "adversarial.attack": "fgsm",
    "adversarial.radius": 0.05,
    "adversarial.eval_attack": "fgsm",
    "adversarial.eval_radius": 0.3,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, Any]]:
    """ABSA with K-FAC, driven by the eigenvalues that K-FAC has anyway."""
    folder = RunFolder(str(tmp_path_factory.mktemp("runs") / "absa"))
    config = small_config(ABSA)
    folder.write_config(config)
    outcome = run_rank(
        config,
        Communicator.solo(),
        store=CheckpointStore(folder.uri),
        callback=FolderWriter(folder),
        control=KeepGoing(),
        datasets=memory_datasets(),
    )
    return folder, result_row(config, outcome)


def test_absa_with_kfac_grows_asks_for_workers_and_reports_both_eigenvalues(
    run: tuple[RunFolder, dict[str, Any]],
) -> None:
    folder, _ = run
    growths = [row for row in folder.events() if row["kind"] == "batch_growth"]
    assert [(row["old_batch_size"], row["new_batch_size"]) for row in growths] == [
        (16, 32),
        (32, 64),
    ]
    assert [row["wanted_workers"] for row in growths] == [2, 3]
    rows = folder.metrics()
    steps = [row for row in rows if "loss" in row]
    assert [row["wanted_workers"] for row in steps if row["step"] in (1, 5, 7)] == [1, 2, 3]
    shares = [row.get("adversarial_fraction", 0.0) for row in steps]
    assert shares[0] == 0.2 and shares[4] == 0.1 and shares[-1] == 0.0
    measured = [row for row in rows if "kfac_eigenvalue" in row]
    # Nothing is measured once the cap is reached.
    assert len(measured) == 2
    assert all(row["hessian_eigenvalue"] and row["kfac_eigenvalue"] > 0 for row in measured)


def test_books_of_a_run_say_where_its_time_went(run: tuple[RunFolder, dict[str, Any]]) -> None:
    _, result = run
    assert result["hessian_s"] > 0
    assert 0 < result["computation_s"] <= result["train_time_s"]
    assert result["communication_s"] >= 0
    parts = result["computation_s"] + result["communication_s"]
    assert parts == pytest.approx(result["train_time_s"], rel=0.5)


def test_evaluations_count_attacked_samples_too(run: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, _ = run
    rows = [row for row in folder.metrics() if "eval_loss" in row]
    assert all(row["eval_adversarial_loss"] > row["eval_loss"] for row in rows)
    assert all(row["eval_adversarial_accuracy"] <= row["eval_accuracy"] for row in rows)
    _, configured = evaluate_run(folder, datasets=memory_datasets())
    assert configured.attacked is not None
    assert configured.attacked.loss == pytest.approx(rows[-1]["eval_adversarial_loss"])
    weak = {"eval_attack": "pgd", "eval_radius": 0.01, "eval_steps": 2}
    _, weaker = evaluate_run(folder, attack=weak, datasets=memory_datasets())
    assert weaker.attacked is not None
    assert weaker.loss < weaker.attacked.loss < configured.attacked.loss


def test_growth_by_schedule_is_an_event_and_scales_the_rate(tmp_path: Path) -> None:
    recorded = RecordingCallback()
    changes = {
        "batch.policy": "gg",
        "batch.max_batch_size": 40,
        "optimizer.lr_schedule": "step",
        "optimizer.decay_epochs": (1,),
        "optimizer.decay_factor": 0.2,
    }
    run_rank(
        small_config(changes),
        Communicator.solo(),
        store=CheckpointStore(tmp_path),
        callback=recorded,
        control=KeepGoing(),
        datasets=memory_datasets(),
    )
    (growth,) = [row for row in recorded.events if row["kind"] == "batch_growth"]
    assert (growth["new_batch_size"], growth["reason"], growth["step"]) == (40, "schedule", 4)
    rates = {row["global_batch_size"]: row["lr"] for row in recorded.metric_rows if "loss" in row}
    # What the cap cuts off the growth goes to the rate: ρ·b'/b = 0.2·40/16.
    assert rates[40] == pytest.approx(0.2 * 40 / 16 * rates[16])


def test_attack_outside_the_pixels_range_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "digits"
    assert main(["shards", "make", "--source", "digits", "--out", str(shards)]) == 0
    capsys.readouterr()
    given = [f"data.shards={shards}", "adversarial.attack=pgd", "adversarial.radius=9"]
    sets = [part for text in given for part in ("--set", text)]
    assert main(["train", str(DIGITS), "--storage", str(tmp_path), *sets]) == 2
    assert "attack radius outside the data range" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits"]
    check_attacks(read_config(DIGITS, [*given[:2], "adversarial.radius=0.1"]))
