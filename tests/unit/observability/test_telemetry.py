"""What the exporters hand to Ray, with gauges that only remember."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_kfac.cluster.run.reporting import MetricsExport
from elastic_kfac.observability.metric_names import METRICS, OTHER, label, metric
from elastic_kfac.observability.telemetry import (
    RankTelemetry,
    RunTelemetry,
    Series,
    TelemetryOptions,
    Values,
)
from elastic_kfac.training.callbacks import event_row
from elastic_kfac.training.measurement import RankProbe

OPTIONS = TelemetryOptions("digits", 1, 4)


class Board:
    """Makes gauges and keeps what they were set to."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[str, ...]] = {}
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.sets = 0

    def __call__(self, name: str, help_text: str, labels: tuple[str, ...]) -> Any:
        self.made[name] = labels
        return _Gauge(self, name)

    def value(self, column: str, **labels: str) -> float | None:
        wanted = frozenset({"run": "digits", **labels}.items())
        return self.values.get((metric(column).exported_name, wanted))


class _Gauge:
    def __init__(self, board: Board, name: str) -> None:
        self._board, self._name = board, name

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self._board.made[self._name])
        self._board.sets += 1
        self._board.values[self._name, frozenset(tags.items())] = value


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def run(board: Board) -> RunTelemetry:
    return RunTelemetry(OPTIONS, board)


def test_exporters_share_the_whole_table(board: Board, run: RunTelemetry) -> None:
    RankTelemetry(OPTIONS, 0, board)
    assert set(board.made) == {entry.exported_name for entry in METRICS}


def test_counters_begin_with_zero_before_anything_happens(board: Board, run: RunTelemetry) -> None:
    for column in ("samples", "failures", "preemptions", "steps_redone", "lost_time_s"):
        assert board.value(column) == 0
    for change in label("change").values:
        assert board.value("resizes", change=change) == 0
    for phase in label("phase").values:
        assert board.value("phase_time_s", phase=phase) == 0
    assert (board.value("min_workers"), board.value("max_workers")) == (1, 4)


def test_state_is_one_of_five_and_the_others_are_zero(board: Board, run: RunTelemetry) -> None:
    for now in label("state").values:
        run.state(now)
        shown = {s: board.value("run_state", state=s) for s in label("state").values}
        assert shown == {s: float(s == now) for s in shown}


def test_every_flush_sets_everything_again(board: Board, run: RunTelemetry) -> None:
    board.values.clear()
    run.flush()
    assert board.value("failures") == 0
    assert board.value("max_workers") == 4
    assert board.value("run_state", state="starting") == 1


def test_samples_of_a_continued_run_count_from_its_beginning_and_not_twice(
    board: Board, run: RunTelemetry
) -> None:
    for samples in (1016, 1032, 1016, 1032, 1048):
        run.stepped({"step": samples // 16, "samples": samples, "global_batch_size": 16})
        run.flush()
    assert board.value("samples") == 48
    assert board.value("step") == 65


def test_columns_that_rows_seldom_have_stay_and_a_step_without_attack_resets_one(
    board: Board, run: RunTelemetry
) -> None:
    run.logged({"step": 8, "loss": 1.0, "adversarial_fraction": 0.25, "computation_s": 3.0})
    run.logged({"step": 8, "eval_loss": 0.5, "eval_accuracy": 0.9, "eval_adversarial_loss": 2.0})
    run.logged({"step": 8, "hessian_eigenvalue": 11.0, "hessian_s": 0.5})
    run.stepped({"step": 9, "samples": 32, "global_batch_size": 16, "wanted_workers": 3})
    run.flush()
    assert board.value("adversarial_fraction") == 0.25
    run.logged({"step": 16, "loss": 0.5, "computation_s": 4.0, "merge_sigma": 7.0})
    run.flush()
    shown = {c: board.value(c) for c in ("adversarial_fraction", "computation_s", "merge_sigma")}
    assert shown == {"adversarial_fraction": 0.0, "computation_s": 4.0, "merge_sigma": 7.0}
    assert board.value("eval_adversarial_loss") == 2.0
    assert (board.value("hessian_eigenvalue"), board.value("hessian_s")) == (11.0, 0.5)
    assert board.value("wanted_workers") == 3


def test_preemption_and_its_hand_over_are_exported(board: Board, run: RunTelemetry) -> None:
    run.event(event_row("preemption", 7, reason="node is being drained", notice_s=90.0))
    run.event(
        event_row(
            "resize",
            8,
            downtime_s=4.0,
            steps_redone=0,
            hand_over_s=0.5,
            phases_s={"noticed": 0.1, "parked": 0.6},
        )
    )
    run.flush()
    assert board.value("preemptions") == 1
    assert board.value("notice_s") == 90
    assert board.value("hand_over_s") == 0.5
    assert board.value("resizes", change="resize") == 1
    assert board.value("resizes", change="recovery") == 0
    assert board.value("moment_s", moment="parked") == 0.6
    assert board.value("downtime_s") == 4


def test_losses_add_up(board: Board, run: RunTelemetry) -> None:
    for redone in (3, 4):
        run.event(event_row("failure", 9, reason="worker died"))
        run.event(event_row("recovery", 9, downtime_s=2.0, steps_redone=redone, hand_over_s=None))
    run.rank_failed("CommunicationError")
    run.rank_failed("ValueError")
    run.flush()
    assert board.value("failures") == 2
    assert board.value("steps_redone") == 7
    assert board.value("lost_time_s") == 4
    assert board.value("resizes", change="recovery") == 2
    assert board.value("communication_errors") == 1
    assert board.value("hand_over_s") is None


def test_open_labels_fold_into_other_when_there_are_too_many(board: Board) -> None:
    series = Series("coordinator", {"run": "digits"}, make_gauge=board)
    most = label("tag").most
    for number in range(most + 5):
        series.add("communication_bytes", 10, (f"tag-{number}",))
    series.flush()
    name = metric("communication_bytes").exported_name
    shown = {dict(tags)["tag"]: v for (n, tags), v in board.values.items() if n == name}
    assert len(shown) == most + 1
    assert shown[OTHER] == 50


def test_counter_never_falls(board: Board) -> None:
    series = Series("rank", {"run": "digits", "rank": "0"}, make_gauge=board)
    for value in (5.0, 3.0, 6.0):
        series.raise_to("stall_s", value)
    series.flush()
    assert board.value("stall_s", rank="0") == 6


def test_rank_beyond_the_bound_shares_a_series(board: Board) -> None:
    RankTelemetry(OPTIONS, label("rank").most, board).export({"step_cpu_s": {(): 0.0}})
    assert board.value("step_cpu_s", rank=OTHER) == 0


def test_rank_exports_once_a_second_and_not_at_every_step(board: Board) -> None:
    now = 0.0
    reported: list[Values] = []
    telemetry = RankTelemetry(OPTIONS, 1, board, clock=lambda: now)
    export = MetricsExport(RankProbe(), telemetry, reported.append)
    for step in range(100):
        now += 0.05
        export.on_point("step_begin", step)
        export.on_point("committed", step)
    sets_per_export = len([e for e in METRICS if e.exporter == "rank" and e.kind == "counter"])
    assert board.sets == 4 * sets_per_export or board.sets == 5 * sets_per_export
    assert reported == []  # Without a trainer the probe is no rank 0.


def test_without_options_nothing_is_made(board: Board) -> None:
    silent = RunTelemetry(None, board)
    silent.state("running")
    silent.event(event_row("failure", 1, reason="worker died"))
    silent.flush()
    assert board.made == {}
