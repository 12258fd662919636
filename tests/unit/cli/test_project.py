"""`init` writes a project that trains as it is; a missing dependency becomes one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from elastic_kfac.cli import main
from elastic_kfac.cli.extras import extra_of, missing_extra
from elastic_kfac.config import read_config
from elastic_kfac.config.shipped import shipped_configs
from elastic_kfac.experiments.search_space import read_space


def test_project_trains_audits_and_has_a_search_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my-rings"]) == 0
    assert capsys.readouterr().out.endswith("train config.yaml --local\n")
    monkeypatch.chdir(tmp_path / "my-rings")
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["train", "config.yaml", "--local", "--name", "a", "--set", "train.epochs=3"]) == 0
    result = json.loads(Path("runs/a/result.json").read_text())
    assert result["best_accuracy"] > 0.9
    assert main(["audit", "a"]) == 0
    assert read_space("space.yaml").base.model == read_config("config.yaml").model


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["full"], "the folder is not empty"),
        (["torch"], "no free name for a Python package"),
        (["3d"], "no free name for a Python package"),
        (["new", "--config", "digitz"], "allowed: caltech_resnet18"),
    ],
)
def test_init_refuses_in_one_line(
    argv: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["init", *argv]) == 2
    assert says in capsys.readouterr().err


def test_bare_name_means_a_shipped_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_config("digits") == read_config(shipped_configs()["digits"])
    space = shipped_configs()["digits"].parents[2] / "tune_spaces" / "smoke.yaml"
    text = space.read_text().replace("../jobs/configs/digits.yaml", "digits")
    (tmp_path / "space.yaml").write_text(text)
    assert read_space("space.yaml").base.model == read_config("digits").model
    (tmp_path / "digits").write_text("train: {epochs: 3}")  # A file of that name comes first.
    assert read_config("digits").train.epochs == 3


DECLARED = [
    "torch>=2.11",
    "scikit-learn; extra == 'train'",
    'ray[default,train]<2.61,>=2.60; extra == "train"',
    "ray; extra == 'dev'",
    "optuna; extra == 'tune'",
]


@pytest.mark.parametrize(
    ("module", "extra"),
    [("sklearn", "train"), ("ray", "train"), ("optuna", "tune"), ("torch", None), ("mine", None)],
)
def test_extra_of_a_module(module: str, extra: str | None) -> None:
    assert extra_of(module, DECLARED) == extra


def test_missing_dependency_is_one_line_and_other_missing_modules_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from elastic_kfac.cli import runs

    def needs(arguments: object) -> int:
        raise ModuleNotFoundError("No module named 'optuna.x'", name="optuna.x")

    monkeypatch.setattr(runs, "report", needs)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: DECLARED)
    assert main(["report", "x"]) == 2
    assert capsys.readouterr().err == (
        "elastic-kfac: error: this needs optuna, which is not installed; "
        "pip install 'elastic-kfac[tune]'\n"
    )
    assert missing_extra(ModuleNotFoundError("x", name="mine")) is None


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_subcommands_and_options(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "resize-at" in script
    assert "bias-variance" in script
