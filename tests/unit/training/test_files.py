"""Run folders and configuration files."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_kfac.config import Config, read_config, write_config
from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.state.run_folder import METRICS, RunFolder


def test_config_written_and_read_back_is_equal(tmp_path: Path) -> None:
    config = read_config(_file(tmp_path, "train: {epochs: 2.5}\nkfac: {damping: 0.01}\n"))
    write_config(config, tmp_path / "again.yaml")
    assert read_config(tmp_path / "again.yaml") == config
    folder = RunFolder(tmp_path / "run")
    folder.write_config(config)
    assert RunFolder.existing(tmp_path / "run").read_config() == config


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert read_config(_file(tmp_path, "")) == Config()


def test_overrides_are_yaml_scalars_and_win_over_the_file(tmp_path: Path) -> None:
    config = read_config(
        _file(tmp_path, "kfac: {damping: 0.5}\n"),
        [
            "kfac.damping=1e-3",
            "kfac.kl_clip=null",
            "train.stop_at_target=true",
            "optimizer.decay_epochs=[1, 2.5]",
            "model.arguments={width: 8}",
            "data.shards=s3://bucket/a=b",
        ],
    )
    assert config.kfac.damping == 1e-3
    assert config.kfac.kl_clip is None
    assert config.train.stop_at_target is True
    assert config.optimizer.decay_epochs == (1.0, 2.5)
    assert config.model.arguments == {"width": 8}
    assert config.data.shards == "s3://bucket/a=b"


@pytest.mark.parametrize(
    ("content", "overrides", "said"),
    [
        ("train: {epochz: 3}\n", [], "epochs"),
        ("train: [1\n", [], "bad YAML"),
        ("- a\n", [], "sections"),
        ("{}", ["kfac.damping"], "section.key=value"),
        ("{}", ["damping=1"], "section.key=value"),
        ("{}", ["kfac.grad_worker_frac=3"], "kfac.grad_worker_frac"),
        ("{}", ["kfac.damping={"], "bad YAML"),
    ],
)
def test_bad_configuration_is_one_line(
    tmp_path: Path, content: str, overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(_file(tmp_path, content), overrides)
    assert said in caught.value.line()
    assert "\n" not in caught.value.line()


def test_missing_configuration_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such configuration file.*nowhere\.yaml"):
        read_config(tmp_path / "nowhere.yaml")


def test_rewind_drops_later_metric_rows_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append(METRICS, [{"step": step, "loss": 1.0} for step in range(1, 6)])
    folder.append_events([{"kind": "resize", "step": 5}])
    assert folder.rewind_metrics(3) == 2
    assert [row["step"] for row in folder.metrics()] == [1, 2, 3]
    assert len(folder.events()) == 1
    assert folder.rewind_metrics(3) == 0
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    folder.append(METRICS, [{"step": 4}])
    assert folder.rewind_metrics(3) == 1
    folder.append(METRICS, [{"step": 4, "loss": 2.0}])
    assert [row["step"] for row in folder.metrics()] == [1, 2, 3, 4]
    assert folder.rewind_metrics(0) == 4
    assert folder.metrics() == []
    assert RunFolder(tmp_path / "new").rewind_metrics(0) == 0


def test_metrics_after_a_torn_line_are_still_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append(METRICS, [{"step": 1}])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    folder.append(METRICS, [{"step": 3}])
    folder.append(METRICS, [{"step": 4}])
    assert [row["step"] for row in folder.metrics()] == [1, 3, 4]


def test_result_before_and_after_the_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.result() is None
    folder.write_result({"status": "finished"})
    assert folder.result() == {"status": "finished"}
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_folder_without_configuration_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run folder"):
        RunFolder.existing(tmp_path)


def _file(folder: Path, content: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(content)
    return path
