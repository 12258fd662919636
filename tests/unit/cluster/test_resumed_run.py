"""Runs under a name that exists: what they accept, what they refuse, and that nothing is lost."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_kfac.cli import main
from elastic_kfac.cluster.run import trainer
from elastic_kfac.cluster.run.in_process import train_in_process
from elastic_kfac.config import read_config
from elastic_kfac.data import make_shards
from elastic_kfac.errors import StateError
from elastic_kfac.runs.audit import audit_run
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from support.small_disk import small_disk

STEPS_PER_EPOCH = 6
Train = Callable[..., int]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    make_shards("digits", root)
    return root


@pytest.fixture
def train(digits: Path, tmp_path: Path) -> Train:
    """`elastic-kfac train --local` of one epoch more than the last time; returns its exit code."""
    path = tmp_path / "quick.yaml"
    path.write_text(
        f"data: {{shards: {digits}}}\nmodel: {{name: mlp}}\n"
        "train: {epochs: 1, global_batch_size: 256}\n"
    )

    def call(*sets: str, name: str = "run", storage: Path = tmp_path) -> int:
        words = ["train", str(path), "--local", "--name", name, "--storage", str(storage)]
        return main([*words, *(word for text in sets for word in ("--set", text))])

    return call


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_changed_keys_are_an_event_with_old_and_new_values_in_terminal_and_report(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lamb = ("optimizer.name=lamb", "optimizer.lr=0.02")
    assert train("optimizer.name=adam", "optimizer.lr=0.01") == 0
    assert "resuming it" not in capsys.readouterr().out
    assert train("train.epochs=2", "kfac.enabled=false", *lamb) == 0
    out = capsys.readouterr().out
    assert f"Run run exists in {tmp_path / 'run'}: resuming it." in out
    assert "the configuration has changed: " in out
    folder = RunFolder(tmp_path / "run")
    (event,) = [row for row in folder.events() if row["kind"] == "configuration"]
    assert event["step"] == STEPS_PER_EPOCH
    assert event["changes"] == {
        "kfac.enabled": [True, False],
        "optimizer.lr": [0.01, 0.02],
        "optimizer.name": ["adam", "lamb"],
        "train.epochs": [1.0, 2.0],
    }
    assert folder.read_config().optimizer.lr == 0.02
    page = (tmp_path / "run" / "report.html").read_text()
    assert "optimizer.lr 0.01 → 0.02" in page and "kfac.enabled True → False" in page
    assert train("train.epochs=2", "kfac.enabled=false", *lamb) == 0
    assert [row["kind"] for row in folder.events()].count("configuration") == 1


@pytest.mark.parametrize(
    ("sets", "line"),
    [
        (["optimizer.name=lamb"], "belongs to another kind of optimizer"),
        (["optimizer.name=adam"], "belongs to another kind of optimizer"),
        (["optimizer.name=lars"], "contains the learning rate; given: optimizer.name=lars"),
        (["train.seed=7"], "train.seed differs from the seed of the checkpoint"),
        (["model.name=small_cnn"], "the state belongs to another model"),
    ],
)
def test_configuration_that_the_checkpoint_refuses_changes_nothing(
    train: Train,
    tmp_path: Path,
    sets: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train() == 0
    before = hashes(tmp_path / "run")
    capsys.readouterr()
    assert train("train.epochs=2", *sets) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1
    assert hashes(tmp_path / "run") == before
    assert train("train.epochs=2") == 0
    assert audit_run(RunFolder(tmp_path / "run")).steps == 2 * STEPS_PER_EPOCH


@pytest.mark.parametrize(
    ("sets", "line"),
    [
        (["train.seed=7"], "train.seed differs"),
        (["optimizer.name=lars"], "contains the learning rate"),
        (["kfac.method=inverse"], "saved with another kfac.method; given: inverse; allowed: eigen"),
        (["batch.policy=bl", "batch.max_batch_size=512"], "batch.policy is not the one"),
        (["elastic.reproducible=true"], "not written in the reproducible mode"),
        (["train.global_batch_size=5000"], "allowed: up to 1438 samples"),
        (["plan.memory_budget_gib=1e-6"], "do not fit the memory budget"),
    ],
)
def test_what_cannot_work_is_refused_before_a_cluster_starts(
    train: Train,
    tmp_path: Path,
    sets: list[str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trainer, "cluster_for", lambda *_: pytest.fail("a cluster started"))
    assert train() == 0
    before = hashes(tmp_path / "run")
    capsys.readouterr()
    words = ["train", str(tmp_path / "quick.yaml"), "--name", "run", "--storage", str(tmp_path)]
    assert main([*words, *(word for text in sets for word in ("--set", text))]) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1
    assert hashes(tmp_path / "run") == before


def test_data_that_has_changed_is_refused_before_a_cluster_starts(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trainer, "cluster_for", lambda *_: pytest.fail("a cluster started"))
    assert train() == 0
    make_shards("clusters10:3", tmp_path / "other")
    words = ["train", str(tmp_path / "quick.yaml"), "--name", "run", "--storage", str(tmp_path)]
    assert main([*words, "--set", f"data.shards={tmp_path / 'other'}"]) == 2
    assert "the run's data set has changed" in capsys.readouterr().err


def test_run_that_ends_before_its_first_checkpoint_claims_none(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("kfac.enabled=false", "optimizer.lr=1e6", "train.epochs=4") == 1
    err = capsys.readouterr().err
    assert "loss or gradients are not finite in step" in err
    assert "no checkpoint was written: all" in err and "steps are lost" in err


def test_run_with_nothing_left_to_train_is_told(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("train.epochs=2") == 0
    assert "raise that" not in capsys.readouterr().out
    assert train() == 0
    assert "It has trained 2 of train.epochs=1 epochs: raise that" in capsys.readouterr().out


def test_run_without_checkpoints_begins_anew_and_says_so_unless_it_was_finished(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = hashes(tmp_path / "run")
    capsys.readouterr()
    assert train("train.seed=7") == 2
    assert "run run is finished, and its checkpoints are gone" in capsys.readouterr().err
    assert hashes(tmp_path / "run") == before
    # As one that failed before it had any.
    (tmp_path / "run" / "result.json").unlink()
    assert train("train.seed=7") == 0
    assert "exists in" in (out := capsys.readouterr().out) and "it begins anew" in out
    folder = RunFolder(tmp_path / "run")
    assert [r["step"] for r in folder.metrics() if "loss" in r] == [*range(1, STEPS_PER_EPOCH + 1)]
    assert audit_run(folder).passed and folder.read_config().train.seed == 7


def test_counted_steps_go_on_from_lamb_to_adam(train: Train, tmp_path: Path) -> None:
    assert train("optimizer.name=lamb", "optimizer.lr=0.01") == 0
    assert train("train.epochs=2", "optimizer.name=adam", "optimizer.lr=0.01") == 0
    state = CheckpointStore(tmp_path / "run").load_latest()
    assert state is not None
    counted = {float(v["step"]) for v in state.part("optimizer").values()}
    assert counted == {2.0 * STEPS_PER_EPOCH}


def test_damaged_result_is_a_warning_and_the_audit_sees_the_newer_checkpoints(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    result = tmp_path / "run" / "result.json"
    ledger = (tmp_path / "run" / "ledger.parquet").read_bytes()
    for damage in (result.read_text()[:40], "[1, 2]", ""):
        result.write_text(damage)
        capsys.readouterr()
        assert train("train.epochs=2") == 0
        assert "result.json is damaged" in capsys.readouterr().out
        assert json.loads(result.read_text())["steps"] == 2 * STEPS_PER_EPOCH
    # As if the second call had been killed before its end.
    (tmp_path / "run" / "ledger.parquet").write_bytes(ledger)
    assert audit_run(RunFolder(tmp_path / "run")).steps == 2 * STEPS_PER_EPOCH


def test_full_disk_is_told_when_it_happens_and_the_end_tells_what_is_safe(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Room for the rows, and for no checkpoint of this model (280 KiB with momentum).
    with small_disk(tmp_path / "disk", 160) as disk:
        assert train("elastic.snapshot_interval_s=0.001", storage=disk) == 1
        captured = capsys.readouterr()
        assert "warning: checkpoint of step" in captured.out
        assert f"no checkpoint was written: all {STEPS_PER_EPOCH} steps are lost" in captured.err
        assert "Traceback" not in captured.err
        assert CheckpointStore(disk / "run").steps() == []


def test_closed_terminal_saves_the_state(train: Train, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "elastic_kfac.cli", "train", str(tmp_path / "quick.yaml")]
    command += [
        "--local",
        "--name",
        "run",
        "--storage",
        str(tmp_path),
        "--set",
        "train.epochs=4000",
    ]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    shown = b""
    while b"step 2" not in shown:
        shown += os.read(ours, 4096)
    os.close(ours)
    process.wait(120)
    folder = RunFolder(tmp_path / "run")
    result = folder.result() or {}
    assert result["status"] == "interrupted" and result["steps"] > 0
    assert CheckpointStore(folder.uri).steps()[-1] == result["steps"]
    (parked,) = [row for row in folder.events() if row["kind"] == "parked"]
    assert parked["reason"] == "SIGHUP"


def test_two_unnamed_runs_at_once_get_two_names_and_one_name_has_one_writer(
    train: Train, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "elastic_kfac.cli", "train", str(tmp_path / "quick.yaml")]
    command += ["--local", "--storage", str(tmp_path / "runs"), "--set", "train.epochs=30"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *more], env=environment, text=True, stderr=subprocess.PIPE
        )

    both = [start(), start("--set", "train.seed=7")]
    assert [(p.communicate()[1], p.returncode) for p in both] == [("", 0), ("", 0)]
    folders = sorted(RunFolder(path).uri for path in (tmp_path / "runs").iterdir())
    assert [Path(uri).name for uri in folders] == ["quick-1", "quick-2"]
    seeds = {RunFolder(uri).read_config().train.seed for uri in folders}
    assert len(seeds) == 2
    assert all(audit_run(RunFolder(uri)).steps == 30 * STEPS_PER_EPOCH for uri in folders)

    same = [start("--name", "one"), start("--name", "one")]
    ends = sorted((p.communicate()[1], p.returncode) for p in same)
    assert ends[0] == ("", 0)
    assert ends[1][1] == 2 and "run one is in use by another process; given: host " in ends[1][0]
    folder = RunFolder(tmp_path / "runs" / "one")
    assert len([r for r in folder.metrics() if "loss" in r]) == 30 * STEPS_PER_EPOCH


@pytest.mark.parametrize("shift_s", [3600.0, -3600.0])
def test_time_between_two_calls_and_a_clock_that_is_set_are_not_counted(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift_s: float
) -> None:
    assert train() == 0
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift_s)
    assert train("train.epochs=2", "train.target_accuracy=0.01") == 0
    folder = RunFolder(tmp_path / "run")
    walls = [row["wall_time_s"] for row in folder.metrics()]
    assert len(walls) > 2 * STEPS_PER_EPOCH
    assert walls == sorted(walls) and 0 < walls[-1] < 300
    result = folder.result() or {}
    assert 0 < result["time_to_accuracy_s"] <= walls[-1] + 1
    (event,) = [row for row in folder.events() if row["kind"] == "continue"]
    assert event["downtime_s"] == 0.0
    assert 3600 <= event["away_s"] < 3900 if shift_s > 0 else event["away_s"] == 0.0


def test_refusal_of_a_state_is_raised_by_the_library_too(train: Train, tmp_path: Path) -> None:
    assert train() == 0
    config = read_config(tmp_path / "quick.yaml", ["train.seed=7"])
    with pytest.raises(StateError, match=r"train\.seed"):
        train_in_process(config, name="run", storage=str(tmp_path))
