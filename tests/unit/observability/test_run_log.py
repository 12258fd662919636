"""Lines of a run's log: JSON with run, rank and step; quiet unless asked."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic_kfac.cluster.run.reporting import LogPosition
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import UsageError
from elastic_kfac.observability.run_log import (
    CONCERNS,
    ROOT,
    LogContext,
    begin_log,
    log_of,
    read_levels,
)
from elastic_kfac.observability.telemetry import RunTelemetry, TelemetryOptions
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.training.callbacks import Callbacks, KeepGoing, event_row
from elastic_kfac.training.loop import run_rank
from support.training_problems import RecordingCallback, memory_datasets, small_config


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    loggers = [logging.getLogger(ROOT), *(log_of(name) for name in CONCERNS)]
    before = [(log, log.level, log.propagate, list(log.handlers)) for log in loggers]
    yield
    for log, level, propagate, handlers in before:
        log.setLevel(level)
        log.propagate = propagate
        log.handlers[:] = handlers


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_every_line_has_run_rank_and_step(written: io.StringIO) -> None:
    context = LogContext("digits", 3, lambda: 17)
    begin_log(context, "info", stream=written)

    log_of("checkpoints").info("checkpoint %s", "written", extra={"fields": {"bytes": 9}})
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        log_of("run").error("it failed", exc_info=True)

    first, second = lines(written)
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "logger": "elastic_kfac.checkpoints",
        "run": "digits",
        "rank": 3,
        "step": 17,
        "message": "checkpoint written",
        "bytes": 9,
    }
    assert "ValueError: first\nsecond" in second["exception"]


def test_rank_and_step_follow_the_trainer_of_the_newest_world(written: io.StringIO) -> None:
    context = LogContext("digits", 1)
    begin_log(context, "info", stream=written)
    for rank in (1, 0):
        trainer = SimpleNamespace(
            communicator=SimpleNamespace(rank=rank), progress=SimpleNamespace(step=5)
        )
        LogPosition(context).on_start(cast(Any, trainer))
        trainer.progress = SimpleNamespace(step=6 + rank)
        log_of("run").info("here")
    assert [(line["rank"], line["step"]) for line in lines(written)] == [(1, 7), (0, 6)]


@pytest.mark.parametrize(
    ("text", "speaking"),
    [
        ("", {"run": "info", "resizes": "info", "checkpoints": "warning", "steps": "warning"}),
        ("warning", dict.fromkeys(("run", "resizes", "checkpoints", "steps"), "warning")),
        ("info", dict.fromkeys(("run", "resizes", "checkpoints", "steps"), "info")),
        ("steps=debug, error", {"run": "error", "steps": "debug"}),
        ("checkpoints=info", {"run": "info", "checkpoints": "info", "steps": "warning"}),
    ],
)
def test_levels_say_who_speaks(text: str, speaking: dict[str, str], written: io.StringIO) -> None:
    begin_log(LogContext("digits"), text, stream=written)
    for concern, lowest in speaking.items():
        written.seek(0)
        written.truncate()
        for level in ("debug", "info", "warning", "error"):
            getattr(log_of(concern), level)("x")
        assert lines(written)[0]["level"] == lowest, concern


@pytest.mark.parametrize("text", ["loud", "steps=loud", "stairs=info", "=info", "run=", "a=b=info"])
def test_bad_levels_are_one_clear_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"bad ELASTIC_KFAC_LOG; given: .*; allowed: a level"):
        read_levels(text)


def test_second_beginning_replaces_the_first(written: io.StringIO) -> None:
    first = io.StringIO()
    begin_log(LogContext("a"), "info", stream=first)
    begin_log(LogContext("b"), "warning", stream=written)
    log_of("run").info("quiet")
    log_of("run").warning("loud")
    assert first.getvalue() == ""
    assert [line["run"] for line in lines(written)] == ["b"]


def _no_gauge(*arguments: Any) -> Any:
    raise AssertionError("exports nothing")


def test_coordinator_logs_states_and_changes_and_not_every_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = RunTelemetry(TelemetryOptions("digits", 1, 4, exports=False), _no_gauge)
    run.stepped({"step": 8, "samples": 64, "global_batch_size": 8})
    run.logged({"step": 8, "loss": 1.0})
    run.state("draining", "a node was added")
    run.event(event_row("resize", 9, from_world_size=1, to_world_size=2, downtime_s=0.5))
    run.event(event_row("failure", 9, reason="rank 1 died"))

    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    shown = [(line["logger"], line["level"], line["step"], line["message"]) for line in said]
    assert shown == [
        ("elastic_kfac.run", "info", None, "starting"),
        ("elastic_kfac.run", "info", 8, "draining: a node was added"),
        ("elastic_kfac.resizes", "info", 9, "resize"),
        ("elastic_kfac.resizes", "warning", 9, "failure: rank 1 died"),
    ]
    assert {line["run"] for line in said} == {"digits"}
    assert (said[2]["to_world_size"], said[2]["downtime_s"]) == (2, 0.5)


def test_rank_logs_with_the_step_it_has_reached(written: io.StringIO, tmp_path: Path) -> None:
    context = LogContext("digits", 9)
    begin_log(context, "info", stream=written)
    recorded = RecordingCallback()
    run_rank(
        small_config(),
        Communicator.solo(),
        store=CheckpointStore(tmp_path / "run"),
        callback=Callbacks(LogPosition(context), recorded),
        control=KeepGoing(),
        datasets=memory_datasets(),
    )
    log_of("checkpoints").info("checkpoint written")
    (line,) = lines(written)
    assert (line["rank"], line["step"]) == (0, recorded.steps[-1])
