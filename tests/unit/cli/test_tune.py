"""`elastic-kfac tune` before anything starts: the grammar, the job, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_kfac.cli.arguments import parse_arguments
from elastic_kfac.cli.entry import main

ROOT = Path(__file__).parents[3]


def test_tune_takes_what_train_takes() -> None:
    words = ["tune", "s.yaml", "--name", "a", "--storage", "b", "--address", "auto"]
    found = parse_arguments([*words, "--set", "optimizer.lr=1"])
    assert (found.space, found.name, found.storage, found.address) == ("s.yaml", "a", "b", "auto")
    assert found.overrides == ["optimizer.lr=1"]
    assert found.command == "elastic_kfac.cli.tune:tune"


def test_impossible_space_ends_with_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(
        f"base: {ROOT / 'jobs/configs/digits.yaml'}\n"
        "parameters: {kfac.inverse_update_steps: {uniform: [1, 10]}}\n"
        "objective: {target_accuracy: 0.9}\n"
        "budget: {epochs: 1}\n"
    )
    assert main(["tune", str(space), "--storage", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "kfac.inverse_update_steps" in said
    assert "use choice or randint" in said
    assert not (tmp_path / "runs").exists()


def test_remote_storage_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    space = str(ROOT / "tune_spaces" / "smoke.yaml")
    assert main(["tune", space, "--storage", "s3://bucket/runs", "--name", "a"]) == 2
    assert "a search keeps its files in a folder" in capsys.readouterr().err
