"""Recipes and the rules of the sections about how a run learns."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.config import Config, parse_config, read_config
from elastic_kfac.training.batch_control import schedule_policy
from elastic_kfac.training.first_order import RateControl, schedule_of
from support.recipes import IMAGENET_SAMPLES, PRESETS

RECIPES = Path(__file__).parents[3] / "jobs" / "configs" / "recipes"


@pytest.mark.parametrize("batch_size", PRESETS)
def test_recipe_is_the_preset_of_its_batch(batch_size: int) -> None:
    preset = PRESETS[batch_size]
    path = RECIPES / f"imagenet_{batch_size}.yaml"
    config, text = read_config(path), path.read_text(encoding="utf-8")
    assert config.train.global_batch_size == batch_size
    assert config.optimizer.name == "sharded_kfac"
    assert (config.train.epochs, config.optimizer.lr) == (preset.epochs, preset.base_lr)
    assert config.optimizer.momentum == preset.base_momentum
    assert config.optimizer.momentum_rule == "ratio0"
    assert (config.kfac.damping, config.mixing.alpha) == (preset.damping, preset.mixup_alpha)
    ours, theirs = schedule_of(config), preset.lr_schedule()
    for epoch in (0, preset.start_epoch, preset.epochs / 2, preset.epochs - 1e-6):
        assert ours(epoch) == theirs(epoch)
    rates = RateControl(config).at(preset.epochs / 2, 1.0)
    assert rates.momentum / preset.base_momentum == pytest.approx(rates.lr / preset.base_lr)
    # ⌈1,281,167 · epochs / batch⌉ iterations; the poster prints another number for 8,192.
    iterations = math.ceil(IMAGENET_SAMPLES * config.train.epochs / batch_size)
    assert f"in {iterations:,} iterations" in text
    assert (iterations == preset.printed_iterations) is (batch_size != 8192)
    assert (f"{preset.printed_iterations:,}" in text) or batch_size != 8192
    steps = math.ceil(IMAGENET_SAMPLES / batch_size) * config.train.epochs
    assert f"makes {steps:,.0f} steps" in text


def test_every_recipe_has_a_preset() -> None:
    found = {int(re.sub(r"\D", "", path.stem)) for path in RECIPES.glob("*.yaml")}
    assert found == set(PRESETS)


def _config(**changes: Any) -> Config:
    values: dict[str, Any] = {"train": {"global_batch_size": 32}}
    for path, value in changes.items():
        section, key = path.split("__")
        values.setdefault(section, {})[key] = value
    return parse_config(values)


ABS: dict[str, Any] = {"batch__policy": "abs", "batch__max_batch_size": 64}
ABSA: dict[str, Any] = {**ABS, "batch__policy": "absa"}


def test_absa_begins_with_the_configured_share_and_stops_half_way() -> None:
    config = _config(**ABSA, adversarial__attack="fgsm", adversarial__fraction=0.4)
    policy = schedule_policy(config)
    assert policy is not None
    assert policy.at(0).adversarial_fraction == 0.4
    assert policy.at(config.train.epochs / 2).adversarial_fraction == 0.0
