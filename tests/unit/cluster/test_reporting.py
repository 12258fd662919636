"""A rank's rows reach the run coordinator although a call fails."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from elastic_kfac.cluster.run import reporting
from elastic_kfac.cluster.run.reporting import RankReporter


class Coordinator:
    """An actor's handle; `failures` are what the next calls raise."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.steps = list(failures), []
        self.record = self
        self.called = threading.Event()

    def remote(self, attempt: int, messages: Any) -> Any:
        def call() -> None:
            self.called.set()
            if self.failures:
                raise self.failures.pop(0)
            self.steps += [row["step"] for _, row in messages]

        return call


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda call: call())
    monkeypatch.setattr(reporting, "RETRY_S", 0.05)


def test_failed_calls_are_repeated_in_order() -> None:
    gone = ActorUnavailableError("away for a moment", None)
    coordinator = Coordinator(gone, gone)
    reporter = RankReporter(coordinator, 1, interval_s=0.0)
    for step in range(1, 30):
        reporter.on_step({"step": step})
    reporter.flush()
    reporter.close()
    assert coordinator.failures == []
    assert coordinator.steps == list(range(1, 30))


def test_reporter_does_not_wait_for_a_coordinator_that_has_ended() -> None:
    coordinator = Coordinator(ActorDiedError())
    reporter = RankReporter(coordinator, 1, interval_s=0.0)
    reporter.on_step({"step": 1})
    assert coordinator.called.wait(10)
    reporter.on_step({"step": 2})
    begin = time.monotonic()
    reporter.close()
    assert time.monotonic() - begin < 10
    assert coordinator.failures == [] and coordinator.steps == []
