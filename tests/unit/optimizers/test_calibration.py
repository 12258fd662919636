"""Measured costs and links: fits, the cache per kind of host, what it is invalid for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.kfac import calibration
from elastic_kfac.kfac.calibration import measure_costs, measured, shared_calibration


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "elastic-kfac" / "calibration"


@pytest.mark.parametrize("method", ["eigen", "inverse"])
def test_measured_costs_grow_with_the_width(method: str) -> None:
    fit = measure_costs(method, dimensions=(16, 64, 192), repeats=2)
    assert 0 < fit.seconds(16) < fit.seconds(192)


def test_a_host_of_a_known_kind_measures_nothing_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measured("inverse")
    [file] = cache.iterdir()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(calibration, "measure_costs", refuse)
    assert measured("inverse") == first
    with pytest.raises(AssertionError):
        measured("eigen")
    with pytest.raises(AssertionError):
        measured("inverse", dtype=torch.float64)
    monkeypatch.setattr(torch, "__version__", "99.0")
    with pytest.raises(AssertionError):
        measured("inverse")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    monkeypatch.setattr(calibration, "measure_costs", refuse)
    file.write_text(json.dumps({"kind": 3}))
    with pytest.raises(AssertionError):  # a damaged file is none
        measured("inverse")


def test_a_cache_that_cannot_be_written_is_no_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    assert measured("inverse").costs.seconds(512) > 0


def test_shared_calibration_alone_is_a_measurement_of_this_process() -> None:
    found = shared_calibration(Communicator.solo(), "inverse")
    assert found.costs.seconds(512) > found.costs.seconds(32) > 0
    assert found.seconds_per_flop > 0 < found.seconds_per_layer
