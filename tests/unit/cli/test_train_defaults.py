"""`train` with nothing but shards and epochs ends well."""

from __future__ import annotations

from pathlib import Path

from elastic_kfac.cli.entry import main
from elastic_kfac.runs.history import read_run
from elastic_kfac.runs.summary import headline


def test_two_lines_of_configuration_train_the_digits(tmp_path: Path) -> None:
    config = tmp_path / "two_lines.yaml"
    config.write_text(
        f"data: {{shards: {tmp_path}/digits, source: digits}}\ntrain: {{epochs: 5}}\n"
    )
    arguments = ["train", str(config), "--local", "--storage", str(tmp_path), "--name", "run"]
    assert main(arguments) == 0
    run = read_run(tmp_path / "run")
    assert headline(run).startswith("Reached 9")
    (*_, (_, _, accuracy, loss)) = run.evaluations
    assert accuracy > 0.95
    assert loss is not None and loss < 0.2
    assert run.config["kfac"]["trust_region"] == "adaptive"
