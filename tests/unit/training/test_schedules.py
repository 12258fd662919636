"""Schedules against their closed forms."""

from __future__ import annotations

import math

import pytest

from elastic_kfac.optimizers.schedules import make_schedule


def test_constant_without_warmup_is_one_everywhere() -> None:
    schedule = make_schedule("constant", total_epochs=10)
    assert [schedule(epoch) for epoch in (0.0, 3.3, 10.0)] == [1.0, 1.0, 1.0]


def test_step_at_a_milestone_decays_exactly_there() -> None:
    schedule = make_schedule("step", total_epochs=100, decay_epochs=(35, 75, 90), decay_factor=0.1)
    assert schedule(34.999) == 1.0
    assert schedule(35.0) == pytest.approx(0.1)
    assert schedule(80.0) == pytest.approx(0.01)
    assert schedule(95.0) == pytest.approx(0.001)


def test_cosine_at_quarter_half_and_end_matches_the_closed_form() -> None:
    schedule = make_schedule("cosine", total_epochs=8, end_fraction=0.2)
    assert schedule(0) == pytest.approx(1.0)
    assert schedule(2) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule(8) == pytest.approx(0.2)
    assert schedule(9) == pytest.approx(0.2)


def test_linear_at_half_is_the_mean_of_start_and_end() -> None:
    assert make_schedule("linear", total_epochs=4, end_fraction=0.5)(2) == pytest.approx(0.75)


def test_warmup_ramps_to_the_schedule_and_does_not_shift_it() -> None:
    plain = make_schedule("cosine", total_epochs=10)
    warm = make_schedule("cosine", total_epochs=10, warmup_epochs=2)
    assert warm(0) == 0
    assert warm(1) == pytest.approx(plain(2) / 2)
    assert warm(2) == pytest.approx(plain(2))
    assert warm(7) == plain(7)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="sawtooth"):
        make_schedule("sawtooth", total_epochs=1)
