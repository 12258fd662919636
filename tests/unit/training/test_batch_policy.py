"""Batch size and rate over world sizes."""

from __future__ import annotations

import pytest

from elastic_kfac.training.batch_control import WorldBatch


def policy(kind: str) -> WorldBatch:
    return WorldBatch(kind, full_batch_size=64, full_world_size=4, num_samples=100)  # type: ignore[arg-type]


def test_keep_global_never_changes_batch_or_rate() -> None:
    fixed = policy("keep_global")
    for world_size, position in ((4, 0), (1, 50), (3, 220)):
        fixed.enter_world(world_size, position)
        assert fixed.batch_size(world_size) == 64
        assert fixed.lr_factor(position + 10) == 1.0


def test_keep_local_scales_the_batch_and_starts_without_a_ramp() -> None:
    local = policy("keep_local")
    local.enter_world(2, 0)
    assert (local.batch_size(1), local.batch_size(2), local.batch_size(4)) == (16, 32, 64)
    assert local.lr_factor(0) == local.lr_factor(500) == 0.5


def test_keep_local_ramps_over_one_epoch_from_where_the_rate_is() -> None:
    local = policy("keep_local")
    local.enter_world(2, 0)
    local.enter_world(4, 200)
    assert local.lr_factor(200) == pytest.approx(0.5)
    assert local.lr_factor(250) == pytest.approx(0.75)
    assert local.lr_factor(300) == pytest.approx(1.0)
    local.enter_world(1, 250)
    assert local.lr_factor(250) == pytest.approx(0.75)
    assert local.lr_factor(350) == pytest.approx(0.25)
    assert local.lr_factor(10_000) == pytest.approx(0.25)


def test_state_in_the_middle_of_a_ramp_goes_on_with_it() -> None:
    local = policy("keep_local")
    local.enter_world(2, 0)
    local.enter_world(4, 200)
    again = policy("keep_local")
    again.load_state_dict(local.state_dict())
    again.enter_world(4, 230)
    assert again.lr_factor(260) == local.lr_factor(260) == pytest.approx(0.8)
