"""The attacks of a configuration, within the range of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_kfac.config import AdversarialConfig, Config
from elastic_kfac.data.feeds import Feed, open_feeds
from elastic_kfac.tasks.adversarial import Attack, AttackKind
from elastic_kfac.tasks.inputs import InputMaker


def training_attack(
    config: AdversarialConfig, make_inputs: InputMaker, feed: Feed
) -> Attack | None:
    """The attack on training samples, if there is one.

    Raises:
        ConfigError: If its radius is outside the data range.
    """
    if config.attack == "none":
        return None
    low, high = data_range(config, make_inputs, feed)
    return Attack(
        config.attack,
        config.radius,
        steps=config.steps,
        step_size=config.step_size,
        random_start=config.random_start,
        low=low,
        high=high,
    )


def evaluation_attack(
    config: AdversarialConfig,
    make_inputs: InputMaker,
    feed: Feed,
    kind: AttackKind | None = None,
    radius: float | None = None,
    steps: int | None = None,
) -> Attack | None:
    """The attack on evaluation samples, if there is one; arguments replace the configured values.

    Raises:
        ConfigError: If its radius is outside the data range.
    """
    if kind is None:
        if config.eval_attack == "none":
            return None
        kind = config.eval_attack
    low, high = data_range(config, make_inputs, feed)
    return Attack(
        kind,
        config.evaluation_radius if radius is None else radius,
        steps=config.eval_steps if steps is None else steps,
        low=low,
        high=high,
    )


def check_attacks(config: Config) -> None:
    """Refuses attacks outside the range of the data, before any worker starts.

    Raises:
        ConfigError: If a radius is.
        DataError: If a split is missing or damaged.
    """
    adversarial = config.adversarial
    if adversarial.attack == adversarial.eval_attack == "none":
        return
    feeds = open_feeds(config)
    try:
        make_inputs = InputMaker(feeds.train, torch.float64, torch.device("cpu"))
        training_attack(adversarial, make_inputs, feeds.train)
        if feeds.evaluation is not None:
            evaluation_attack(adversarial, make_inputs, feeds.evaluation)
    finally:
        feeds.close()


def data_range(
    config: AdversarialConfig, make_inputs: InputMaker, feed: Feed
) -> tuple[float | Tensor, float | Tensor]:
    """Smallest and largest inputs: as configured, else those of pixels; other features have none.

    Never the ends of a batch, which depend on who else is in it.
    """
    if config.data_range is not None:
        return config.data_range
    if feed.read(0, 0, 1).images.dtype == torch.uint8:
        return make_inputs.pixel_range()
    return float("-inf"), float("inf")
