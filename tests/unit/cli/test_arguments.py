from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_kfac.cli import main
from elastic_kfac.cli.arguments import COMMANDS, parse_arguments
from elastic_kfac.cli.entry import job_arguments
from elastic_kfac.errors import UsageError

SOURCE_ROOT = Path(__file__).parents[3] / "platform"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("elastic-kfac: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["trian", "x.yaml"], "did you mean train?"),
        (["shards", "mkae"], "did you mean make?"),
        (["train", "x.yaml", "--sotrage", "here"], "did you mean --storage?"),
        (["shards", "make", "--sorce=digits"], "did you mean --source?"),
        (["train", "x.yaml", "--stor", "here"], "did you mean --storage?"),
        (["zzzzqqq"], "allowed: shards, train"),
        ([], "needs a subcommand"),
        (["shards"], "needs a subcommand"),
        (["train"], "CONFIG"),
        (["train", "x.yaml", "y.yaml"], "y.yaml"),
        (["train", "x.yaml", "--name"], "--name"),
        (["train", "x.yaml", "--name", "../escape"], "given: ../escape"),
        (["train", "x.yaml", "--resize-at", "60"], "STEP:NODES"),
        (["train", "x.yaml", "--resize-at", "60:0"], "nodes >= 1"),
        (["train", "x.yaml", "--kill-at", "0:1"], "step >= 1"),
        (["plan", "x.yaml", "--world-size", "2,0"], "given: 2,0"),
        (["plan", "x.yaml"], "--world-size"),
        (["train", "x.yaml", "--storage", ""], '--storage is empty; given: ""'),
        (["train", "x.yaml", "--storage="], "--storage is empty"),
        (["evaluate", ""], "RUN is empty"),
        (["shards", "make", "--source", "digits", "--out", ""], "--out is empty"),
    ],
)
def test_main_with_bad_usage_prints_one_line_and_returns_2(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert expected in one_line(capsys)


def test_parse_train_with_every_option_keeps_the_order_of_repeats() -> None:
    words = "train c.yaml --set kfac.damping=1 --set train.epochs=2 --name a"
    arguments = parse_arguments(
        [*words.split(), "--resize-at", "60:1", "--resize-at", "120:2", "--kill-at", "30:0"]
    )
    assert arguments.overrides == ["kfac.damping=1", "train.epochs=2"]
    assert arguments.resize_at == [(60, 1), (120, 2)]
    assert arguments.kill_at == [(30, 0)]
    assert (arguments.storage, arguments.address) == ("./runs", None)


def test_parse_twice_does_not_carry_repeats_over() -> None:
    parse_arguments(["train", "c.yaml", "--resize-at", "60:1"])
    assert parse_arguments(["train", "c.yaml"]).resize_at == []


def test_parse_world_sizes_with_list_returns_tuple() -> None:
    assert parse_arguments(["plan", "c", "--world-size", "1,2,5"]).world_size == (1, 2, 5)


def test_job_uses_the_cluster_that_it_runs_on() -> None:
    inside = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    assert job_arguments("train", ["c.yaml"], {}) == ["train", "c.yaml"]
    assert job_arguments("shards make", [], inside) == ["shards", "make", "--address", "auto"]
    for given in (["s.yaml", "--address=x:1"], ["s.yaml", "--address", "h:1"]):
        assert job_arguments("tune", given, inside) == ["tune", *given]


@pytest.mark.parametrize(
    ("job", "command"),
    [("train", "train"), ("tune", "tune"), ("compare", "compare"), ("make_shards", "shards make")],
)
def test_script_of_a_job_runs_its_command(job: str, command: str) -> None:
    done = subprocess.run(
        [sys.executable, SOURCE_ROOT.parent / "jobs" / f"{job}.py", "--help"],
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"usage: elastic-kfac {command} ")


def test_every_command_exists_and_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        module, _, function = command.function.partition(":")
        assert callable(getattr(importlib.import_module(f"elastic_kfac.cli.{module}"), function))
        assert main([*name.split(), "--help"]) == 0
        assert command.help in " ".join(capsys.readouterr().out.split())


def test_usage_error_names_the_allowed_options() -> None:
    with pytest.raises(UsageError, match="--resize-at"):
        parse_arguments(["train", "--qqq"])


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["shards", "make", "--help"]])
def test_help_returns_0_and_names_the_program(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 0
    assert "elastic-kfac" in capsys.readouterr().out


def test_help_and_misspelt_options_import_nothing_heavy() -> None:
    code = (
        "import sys; from elastic_kfac.cli import main; main(['--help']); main(['trian']);"
        "main(['train', '--zzz']);"
        "heavy = {'torch', 'ray', 'pyarrow', 'numpy', 'matplotlib', 'pydantic'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_keyboard_interrupt_returns_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from elastic_kfac.cli import runs

    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "report", interrupted)
    assert main(["report", "x"]) == 130
    assert "interrupted" in capsys.readouterr().err
