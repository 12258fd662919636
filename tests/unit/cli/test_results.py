"""What people take from a run: numbers by class, JSON, and a file for plain torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastic_kfac.checkpoints import load_curvature
from elastic_kfac.cli import main
from elastic_kfac.data.sources.generated import digit_images
from elastic_kfac.tasks.models import create_model

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on digits whose weights are averaged."""
    folder = tmp_path_factory.mktemp("results")
    options = ("train.epochs=3", "train.early_stop={patience: 9}", "optimizer.average_decay=0.8")
    sets = [word for each in options for word in ("--set", each)]
    data = ["--set", f"data.shards={folder}/digits"]
    argv = ["train", "digits", "--local", "--storage", str(folder), "--name", "run", *sets, *data]
    assert main(argv) == 0
    return folder / "run"


def as_json(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*argv, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_numbers_by_class_add_up(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "evaluate", str(run), "--by-class")
    classes = found["classes"]
    assert [each["name"] for each in classes] == [str(digit) for digit in range(10)]
    assert sum(each["count"] for each in classes) == found["samples"] == 359
    right = sum(each["count"] * each["recall"] for each in classes)
    assert right / 359 == pytest.approx(found["accuracy"])
    for each in classes:
        if each["precision"] and each["recall"]:
            mean = 2 / (1 / each["precision"] + 1 / each["recall"])
            assert each["f1"] == pytest.approx(mean)
    training = as_json(capsys, "evaluate", str(run), "--split", "train")
    assert (training["samples"], training["classes"]) == (1438, [])
    assert main(["evaluate", str(run), "--by-class"]) == 0
    assert capsys.readouterr().out.count("\n") == 12
    assert main(["evaluate", str(run), "--split", "dev"]) == 2
    assert "allowed: test, train" in capsys.readouterr().err


def test_json_of_audit_report_and_doctor(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audited = as_json(capsys, "audit", str(run))
    assert (audited["passed"], audited["problems"], audited["complete_epochs"]) == (True, [], 3)
    reported = as_json(capsys, "report", str(run))
    assert Path(reported["report"]).is_file()
    assert reported["steps"] == audited["steps"]
    doctor = as_json(capsys, "doctor", "--storage", str(run / "config.yaml"), code=1)
    (storage,) = (each for each in doctor["findings"] if each["subject"] == "storage")
    assert (doctor["ready"], storage["level"]) == (False, "fail")


def test_loader_of_the_documentation_gives_the_same_accuracy(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy = as_json(capsys, "evaluate", str(run))["accuracy"]
    assert main(["export", str(run), "--out", str(tmp_path / "model.safetensors")]) == 0
    code = re.search(r"```python\n(.*?)```", (DOCS / "export.md").read_text("utf-8"), re.DOTALL)
    assert code is not None
    assert code[1].count("\n") <= 11
    images, labels = digit_images("test")
    monkeypatch.chdir(tmp_path)
    # What stands for a person's own module and images.
    scope: dict[str, Any] = {
        "make_model": lambda outputs, shape: create_model("small_cnn", outputs, tuple(shape)),
        "images": torch.from_numpy(np.asarray(images)).view(-1, 1, 8, 8),
    }
    exec(code[1], scope)
    right = [name == str(label) for name, label in zip(scope["names"], labels, strict=True)]
    assert np.mean(right) == accuracy
    assert scope["card"]["averaged"] is True


def test_export_without_shards_says_what_is_missing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, away = run.parent / "digits", tmp_path / "away"
    shards.rename(away)
    try:
        assert main(["export", str(run), "--out", str(tmp_path / "m.safetensors")]) == 0
    finally:
        away.rename(shards)
    assert "warning: without classes and normalisation" in capsys.readouterr().err


def test_curvature_of_a_run_belongs_to_its_model(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "curvature.safetensors"
    assert main(["curvature", str(run), "--out", str(out)]) == 0
    assert re.search(r"\d+ layers at step \d+", capsys.readouterr().out)
    model = create_model("small_cnn", 10, (1, 8, 8))
    curvature = load_curvature(out, model)
    model(torch.zeros(2, 1, 8, 8)).sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    curvature.precondition(1e-3)
    assert not any(map(torch.equal, before, (p.grad for p in model.parameters())))
    assert main(["curvature", str(run), "--checkpoint", "7"]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
