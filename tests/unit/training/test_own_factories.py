"""What a person's factories of models, tasks and losses may do wrong: one line, with the place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from elastic_kfac.cli import main
from elastic_kfac.data import make_shards

OWN = """
from torch import nn

def mean_loss(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels)

def takes_nothing():
    return nn.Linear(1, 1)

def raises(*arguments, **named):
    raise ValueError("no such width")

def deep(*arguments, **named):
    return nn.Linear("a", 2)

def half(*arguments, **named):
    return "a model"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    make_shards("digits", root / "digits")
    (root / "run.yaml").write_text(f"data: {{shards: {root}/digits}}\ntrain: {{epochs: 1}}\n")
    (root / "own_parts_here.py").write_text(OWN)
    (root / "own_raises_here.py").write_text("import sys\n\nvalue = 1 / 0\n")
    (root / "own_cut_here.py").write_text("def f(:\n")
    return root


@pytest.mark.parametrize("key", ["model.name", "task.name", "train.loss"])
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("own_parts_here:takes_nothing", ("takes_nothing() takes 0 positional arguments",)),
        ("own_parts_here:raises", ("it raised ValueError: no such width (own_parts_here.py:11)",)),
        ("own_parts_here:deep", ("do not fit", "it cannot be called")),
        ("own_parts_here:half", ("returned no", "no method loss")),
        ("own_raises_here:f", ("cannot be imported: ZeroDivisionError: division by zero", ":3)")),
        ("own_cut_here:f", ("cannot be imported: SyntaxError",)),
        ("builtins:zip", ("returned no", "it cannot be called", "do not fit", "no method loss")),
    ],
)
def test_factory_that_cannot_be_used_is_one_line(
    folder: Path,
    key: str,
    name: str,
    parts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    arguments = ["train", str(folder / "run.yaml"), "--local", "--set", f"{key}={name}"]
    try:
        assert main(arguments) == 2
    finally:
        sys.modules.pop(name.partition(":")[0], None) if "builtins" not in name else None
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert any(part in err for part in parts), err
    assert name in err
    assert not (folder / "runs").exists()
