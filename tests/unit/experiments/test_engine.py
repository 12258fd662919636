"""The engine of searches and studies without a cluster: the loop, the live line, and the page."""

from __future__ import annotations

import pytest

from elastic_kfac.experiments.engine import Engine, status_line
from elastic_kfac.experiments.trials import Trial, TrialTable
from elastic_kfac.runs.signals import StopSignals
from support.lines import SilentLine


def trial(name: str, status: str, *, fraction: float = 0.0, **numbers: float) -> Trial:
    point = name.rpartition("-s")[0]
    return Trial(name, point, 0, status=status, fraction=fraction, numbers=dict(numbers))


class Countdown:
    """An executor that has news a number of times, and ends sooner when it is stopped."""

    def __init__(self, engine: Engine, polls: int, signal_at: int | None = None) -> None:
        self.engine, self.polls, self.signal_at = engine, polls, signal_at
        self.stopped: list[str] = []

    def poll(self) -> bool:
        self.polls -= 1
        self.engine.has_news = True
        if self.polls == self.signal_at:
            self.engine.signals.reason = "SIGTERM"
        return self.polls > 0

    def stop(self, reason: str) -> None:
        self.stopped.append(reason)


def make_engine(write_page: object) -> tuple[Engine, list[str]]:
    lines: list[str] = []
    table = TrialTable()
    return Engine(table, SilentLine(lines), StopSignals(), write_page, slots=1), lines  # type: ignore[arg-type]


def test_engine_polls_until_all_has_ended_and_writes_the_page_now_and_then() -> None:
    pages: list[int] = []
    engine, lines = make_engine(lambda: pages.append(1))
    executor = Countdown(engine, polls=50)
    engine.run(executor)
    assert (executor.polls, executor.stopped, lines) == (0, [], [])
    # Fifty changes within five seconds are one page.
    assert pages == [1]
    engine.write_page()
    assert pages == [1, 1] and not engine.has_news


def test_engine_stops_its_executor_once() -> None:
    engine, _ = make_engine(lambda: None)
    executor = Countdown(engine, polls=9, signal_at=6)
    engine.run(executor)
    assert executor.stopped == ["SIGTERM"]


def test_page_that_cannot_be_written_does_not_end_the_training() -> None:
    def fails() -> None:
        raise OSError("no space left")

    engine, lines = make_engine(fails)
    engine.run(Countdown(engine, polls=3))
    assert lines == ["the report could not be written: OSError: no space left"]


def test_status_line_counts_trials_and_estimates_the_rest_from_the_same_point() -> None:
    trials = [
        trial("A-s0", "finished", train_time_s=40.0),
        trial("B-s0", "finished", train_time_s=10.0),
        trial("C-s0", "failed"),
        trial("A-s1", "running", fraction=0.25, started=0.0),
        trial("B-s1", "pending"),
    ]
    # A quarter of A is done (30 s left), then B takes 10 s.
    assert status_line(trials, 0, 1, clock=lambda: 50.0) == (
        "3 of 5 trials  1 failed  training A-s1 25%  about 40.0 s left"
    )
    assert "about 20.0 s left" in status_line(trials, 0, 2, clock=lambda: 50.0)
    # A point that has not been planned takes as long as others do on average.
    assert "of 6 trials" in status_line(trials, 1, 1, clock=lambda: 50.0)
    assert "about 1 min 05 s left" in status_line(trials, 1, 1, clock=lambda: 50.0)


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, None), (0.5, "about 20.0 s left")])
def test_status_line_estimates_from_a_running_trial_alone(
    fraction: float, expected: str | None
) -> None:
    running = [trial("A-s0", "running", fraction=fraction, started=100.0)]
    line = status_line(running, 0, 1, clock=lambda: 120.0)
    assert line.startswith("0 of 1 trials  training A-s0")
    assert ("left" in line) == (expected is not None)
    assert expected is None or expected in line
