"""Measured decomposition costs."""

from __future__ import annotations

import pytest

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.kfac.calibration import measure_costs, shared_costs


@pytest.mark.parametrize("method", ["eigen", "inverse"])
def test_measured_costs_grow_with_the_width(method: str) -> None:
    fit = measure_costs(method, dimensions=(16, 64, 192), repeats=2)
    assert 0 < fit.seconds(16) < fit.seconds(192)


def test_shared_costs_alone_are_a_measurement_of_this_process() -> None:
    model = shared_costs(Communicator.solo(), "inverse")
    assert model.seconds(512) > model.seconds(32) > 0
