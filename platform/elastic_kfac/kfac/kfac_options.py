"""Checks of KFAC's hyperparameters: field, value, range."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from elastic_kfac.curvature.block import Block, BlockOptions
from elastic_kfac.errors import ConfigError

_CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("eigen", "inverse"),
    "inverse_damping": ("pi", "sqrt", "plain"),
    "factor_scale": ("per_sample", "sc20", "kaisa"),
    "weight_sharing": ("expand", "reduce"),
    "bn_fisher": ("unit", "full", "diag"),
    "ema_init": ("first", "identity"),
    "fisher": ("empirical", "1mc", "mc", "exact"),
}


def check_choice(name: str, value: object) -> None:
    """Raises ConfigError unless `value` is one of the field's words."""
    allowed = _CHOICES[name]
    if value not in allowed:
        raise ConfigError(
            f"{name} is not one of its values", given=value, allowed=", ".join(allowed)
        )


def check_scheduled(name: str, value: Any, step: int | None = None) -> None:
    """Raises ConfigError unless a schedulable number is in its range."""
    where = "" if step is None else f" at step {step}"
    if name == "kl_clip" and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            f"{name}{where} must be a number or a function of the step", given=repr(value)
        )
    if name in ("factor_update_steps", "inverse_update_steps"):
        good, allowed = value >= 1 and float(value).is_integer(), "an integer >= 1"
    elif name == "factor_decay":
        good, allowed = 0 <= value < 1, "0 <= factor_decay < 1"
    elif name == "lr":
        good, allowed = value >= 0, "lr >= 0"
    else:
        good, allowed = value > 0, f"{name} > 0" + (" or None" if name == "kl_clip" else "")
    if not good or not math.isfinite(value):
        raise ConfigError(f"{name}{where} is out of range", given=value, allowed=allowed)


def check_options(
    options: BlockOptions,
    *,
    fisher: str,
    grad_worker_frac: float | str,
    weight_decay: float,
    accumulation_steps: int,
    colocate: bool,
) -> None:
    """Checks what does not change over the steps.

    Raises:
        ConfigError: With the field, its value and what is allowed.
    """
    for name in ("method", "inverse_damping", "factor_scale", "weight_sharing", "bn_fisher"):
        check_choice(name, getattr(options, name))
    check_choice("ema_init", options.ema_init)
    check_choice("fisher", fisher)
    if grad_worker_frac != "auto" and not (
        isinstance(grad_worker_frac, int | float) and 0 < grad_worker_frac <= 1
    ):
        raise ConfigError(
            "grad_worker_frac is out of range",
            given=grad_worker_frac,
            allowed="0 < grad_worker_frac <= 1, or 'auto'",
        )
    if not options.bn_damping_multiplier > 0:
        raise ConfigError(
            "bn_damping_multiplier is out of range",
            given=options.bn_damping_multiplier,
            allowed="> 0",
        )
    if not weight_decay >= 0:
        raise ConfigError("weight_decay is out of range", given=weight_decay, allowed=">= 0")
    if not (isinstance(accumulation_steps, int) and accumulation_steps >= 1):
        raise ConfigError(
            "accumulation_steps is out of range",
            given=accumulation_steps,
            allowed="an integer >= 1",
        )
    if options.precompute and options.method != "eigen":
        raise ConfigError(
            "precompute caches eigenvalue products",
            given="method='inverse'",
            allowed="method='eigen'",
        )
    if options.precompute and not colocate:
        raise ConfigError(
            "precompute needs both factors on one rank",
            given="colocate=False",
            allowed="colocate=True",
        )


def warn_if_layers_disagree(blocks: Sequence[Block]) -> bool:
    """Says once that inferred sample counts contradict each other; returns whether it did."""
    seen = {block.pending.samples: block.name for block in blocks if block.pending.rows}
    if len(seen) < 2:
        return False
    said = ", ".join(f"{count} in {name}" for count, name in sorted(seen.items()))
    warnings.warn(
        f"layers count different numbers of samples ({said}); pass num_samples and "
        "loss_scale_per_sample to step()",
        UserWarning,
        stacklevel=4,
    )
    return True


def rates_of(optimizer: torch.optim.Optimizer, blocks: Sequence[Block]) -> list[float]:
    """The learning rate of each block's weight.

    Raises:
        ConfigError: If the optimizer does not hold one of the weights.
    """
    by_parameter = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    missing = [b.name for b in blocks if id(b.parameters[0]) not in by_parameter]
    if missing:
        raise ConfigError(
            f"the optimizer given as lr does not hold the weight of layer {missing[0]}",
            change="build the optimizer over all parameters of the model",
        )
    return [float(by_parameter[id(block.parameters[0])]) for block in blocks]
