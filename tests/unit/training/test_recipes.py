"""Recipes and the rules of the sections about how a run learns."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.config import Config, parse_config, read_config
from elastic_kfac.errors import ConfigError
from elastic_kfac.training.batch_control import course_policy
from elastic_kfac.training.first_order import schedule_of
from elastic_kfac.training.rates import RateControl
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


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch__policy": "adabatch"}, "'constant'"),
        ({"batch__policy": "abs"}, "needs batch.max_batch_size"),
        ({**ABS, "batch__max_batch_size": 16}, "below train.global_batch_size=32"),
        ({**ABS, "batch__growth": 1.01}, "leaves a batch of 32 as it is"),
        ({**ABS, "elastic__batch_policy": "keep_local"}, "keep_local"),
        ({**ABS, "adversarial__attack": "fgsm"}, "use absa"),
        ({**ABS, "elastic__reproducible": True}, "batch.policy=abs"),
        ({**ABS, "batch__eigenvalue": "kfac", "kfac__enabled": False}, "needs kfac.enabled"),
        (ABSA, "needs adversarial.attack"),
        ({**ABS, "batch__policy": "gg"}, "lr_schedule=step"),
        ({**ABS, "batch__policy": "warmup"}, "batch.stages"),
        ({**ABS, "batch__policy": "warmup", "batch__stages": ((1, 48), (2, 40))}, "never fall"),
        ({**ABS, "batch__policy": "fb", "optimizer__warmup_epochs": 1}, "warmup_epochs=0"),
        ({"elastic__batch_policy": "abs"}, "needs a batch that grows"),
        (
            {
                "adversarial__attack": "fgsm",
                "adversarial__radius": 2.0,
                "adversarial__data_range": (0.0, 1.0),
            },
            "outside the data range: 0 to 1",
        ),
        ({"adversarial__attack": "fgsm", "adversarial__steps": 3}, "use pgd"),
        ({"adversarial__attack": "deepfool"}, "'fgsm'"),
        ({"adversarial__data_range": (1.0, 0.0)}, "is empty"),
        ({"mixing__alpha": 1.5}, "less than or equal to 1"),
        ({"mixing__erasing_area": (0.5, 0.2)}, "erasing_area"),
        ({"mixing__mixup": "running", "elastic__reproducible": True}, "mixing.mixup=running"),
        ({"train__sync_batch_norm_group": 2}, "needs train.sync_batch_norm=true"),
        ({"optimizer__momentum_rule": "ratio0"}, "velocity_sgd or sharded_kfac"),
        ({"optimizer__name": "lars", "optimizer__nesterov": True}, "nesterov"),
        (
            {"optimizer__lr_schedule": "polynomial", "optimizer__decay_start_epoch": 10},
            "decay_start_epoch=10",
        ),
        ({"elastic__merge": "distnewton"}, "does not go with kfac.enabled=true"),
        ({"elastic__merge_every_steps": 4}, "merge_every_steps=4 does not go with"),
        (
            {
                "elastic__merge_every_steps": 4,
                "kfac__enabled": False,
                "train__sync_batch_norm": True,
            },
            "train.sync_batch_norm=true",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_one_clear_line(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        _config(**changes)
    assert says in refused.value.line()
    assert "\n" not in refused.value.line()


def test_absa_begins_with_the_configured_share_and_stops_half_way() -> None:
    config = _config(**ABSA, adversarial__attack="fgsm", adversarial__fraction=0.4)
    policy = course_policy(config)
    assert policy is not None
    assert policy.at(0).adversarial_fraction == 0.4
    assert policy.at(config.train.epochs / 2).adversarial_fraction == 0.0
