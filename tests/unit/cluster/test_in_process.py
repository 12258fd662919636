"""`train --local`: a run in this process, without Ray, that a cluster can continue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

import elastic_kfac
from elastic_kfac.cli import main
from elastic_kfac.cluster.run.in_process import train_in_process
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.config import Config, parse_config
from elastic_kfac.data import make_shards
from elastic_kfac.errors import ConfigError, RunError, UsageError
from elastic_kfac.runs.audit import audit_run
from elastic_kfac.runs.feasibility import check_parts
from elastic_kfac.state.run_folder import RunFolder

STEPS_PER_EPOCH = 12


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    make_shards("digits", root)
    return root


def _config(digits: Path, **sections: dict[str, Any]) -> Config:
    train = {"epochs": 2, "global_batch_size": 128, **sections.pop("train", {})}
    return parse_config({"data": {"shards": str(digits)}, "train": train, **sections})


class SignalAt(Display):
    """Sends itself SIGTERM once `step` was shown."""

    def __init__(self, step: int) -> None:
        self.step, self.sent = step, False

    def update(self, view: Any) -> None:
        if not self.sent and view.progress.get("step", 0) >= self.step:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_run_continues_with_the_bits_of_a_quiet_one(digits: Path, tmp_path: Path) -> None:
    config = _config(digits, train={"epochs": 6})
    quiet = train_in_process(config, name="quiet", storage=str(tmp_path), progress=Display())
    display = SignalAt(1)
    first = train_in_process(config, name="stopped", storage=str(tmp_path), progress=display)
    assert display.sent and first.status == "interrupted" and first.exit_code == 130
    assert 0 < first.values["steps"] < 6 * STEPS_PER_EPOCH
    second = train_in_process(config, name="stopped", storage=str(tmp_path), progress=Display())

    assert second.status == "finished" and second.values["steps"] == 6 * STEPS_PER_EPOCH
    assert second.values["final_state_sha256"] == quiet.values["final_state_sha256"]
    assert second.values["steps_redone"] == 0
    folder = RunFolder(tmp_path / "stopped")
    assert [row["kind"] for row in folder.events() if row["kind"] in ("start", "continue")] == [
        "start",
        "continue",
    ]
    losses = [row["step"] for row in folder.metrics() if "loss" in row]
    assert losses == sorted(set(losses))
    assert audit_run(folder).passed


def test_no_part_of_ray_is_imported(digits: Path, tmp_path: Path) -> None:
    path = tmp_path / "quick.yaml"
    path.write_text(f"data: {{shards: {digits}}}\ntrain: {{epochs: 1, global_batch_size: 256}}\n")
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from elastic_kfac.cli import main\n"
        f"sys.exit(main(['train', {str(path)!r}, '--local', '--storage', {str(tmp_path)!r}]))"
    )
    path = {"PYTHONPATH": str(Path(elastic_kfac.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **path}
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "quick-1" / "report.html").exists()
    assert "on 1 worker" in done.stdout


def test_a_failing_model_shows_its_traceback_and_keeps_the_record(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(digits, model={"name": "support.own_parts:FailsInTraining"})
    with pytest.raises(RunError, match="ZeroDivisionError: on purpose"):
        train_in_process(config, name="run", storage=str(tmp_path))
    assert "Traceback" in capsys.readouterr().out
    result = RunFolder(tmp_path / "run").result() or {}
    assert result["status"] == "failed" and "on purpose" in result["error"]


def test_what_needs_a_cluster_is_refused(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=r"one worker.*min_workers=2"):
        train_in_process(
            _config(digits, elastic={"min_workers": 2, "max_workers": 2}),
            name="run",
            storage=str(tmp_path),
        )
    path = tmp_path / "quick.yaml"
    path.write_text(f"data: {{shards: {digits}}}\ntrain: {{epochs: 1}}\n")
    for options in (["--address", "auto"], ["--resize-at", "5:1"], ["--kill-at", "5:0"]):
        assert main(["train", str(path), "--local", "--storage", str(tmp_path), *options]) == 2
        assert "--local trains in this process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"model": {"name": "support.own_parts:TooNarrow"}}, "fail on a batch.*shapes"),
        ({"model": {"name": "support.own_parts:missing"}}, "no callable missing"),
        ({"train": {"loss": "support.own_parts:MeanLoss"}}, "not a sum over samples"),
        ({"train": {"loss": "support.own_parts:SumLoss"}}, None),
    ],
)
def test_parts_that_do_not_fit_are_found_before_a_cluster_starts(
    digits: Path, sections: dict[str, Any], line: str | None
) -> None:
    config = _config(digits, **sections)
    if line is None:
        check_parts(config)
        return
    with pytest.raises(ConfigError, match=line):
        check_parts(config)


@pytest.mark.slow
def test_decompositions_in_another_process_give_the_same_run(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kfac = {"stagger": True, "factor_update_steps": 2, "inverse_update_steps": 4}
    jobs: list[object] = []
    submit = ProcessPoolExecutor.submit

    def counted(self: ProcessPoolExecutor, *arguments: Any) -> Future[Any]:
        jobs.append(submit(self, *arguments))
        return cast("Future[Any]", jobs[-1])

    monkeypatch.setattr(ProcessPoolExecutor, "submit", counted)
    hashes = []
    for count in (0, 1):
        config = _config(digits, kfac=kfac, plan={"decomposers": count})
        result = train_in_process(
            config, name=f"{count}", storage=str(tmp_path), progress=Display()
        )
        hashes.append(result.values["final_state_sha256"])
        assert bool(jobs) == bool(count)
    assert hashes[0] == hashes[1]
    assert all(cast("Future[Any]", job).exception() is None for job in jobs)
