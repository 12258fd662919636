"""`elastic-kfac tune` before anything starts: the grammar, the job, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_kfac.cli.arguments import parse_arguments
from elastic_kfac.cli.entry import main
from elastic_kfac.errors import UsageError
from elastic_kfac.experiments import engine

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


@pytest.mark.parametrize(
    ("parameter", "line"),
    [
        ("kfac.damping: {grid: [0.1]}", "cluster started"),
        ("train.global_batch_size: {grid: [4000, 64]}", "cluster started"),
        ("train.global_batch_size: {grid: [4000, 5000]}", "up to 1438 samples"),
        ("data.eval_split: {grid: [nothing]}", "no such split"),
        ("model.name: {grid: [resnet18]}", "resnet18 needs images of 3 channels"),
    ],
)
def test_search_none_of_whose_points_can_run_is_refused_before_a_cluster_starts(
    parameter: str,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start(*_: object, **__: object) -> None:
        raise UsageError("cluster started")

    monkeypatch.setattr(engine, "cluster_for", start)
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text("data: {shards: d, source: digits}\nmodel: {name: mlp}\n")
    Path("space.yaml").write_text(
        f"base: digits.yaml\nparameters: {{{parameter}}}\nsearcher: {{name: grid}}\n"
        "objective: {target_accuracy: 0.9}\nbudget: {epochs: 1}\n"
    )
    assert main(["tune", "space.yaml"]) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1
