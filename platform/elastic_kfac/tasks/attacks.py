"""Adversarial attacks on inputs: FGSM, PGD and L2, and those that a configuration asks for.

An attack sees the model in evaluation mode and differentiates with respect to the input only: it updates
no running statistic, leaves no gradient on a parameter and is invisible to K-FAC. The result does
not depend on the samples, chunks or ranks that share its pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from elastic_kfac.config import AdversarialConfig, Config
from elastic_kfac.data.columns import check_one_tensor
from elastic_kfac.data.dataset import Dataset, open_datasets
from elastic_kfac.data.order import stream_key, uniforms
from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.tasks.models import evaluating
from elastic_kfac.tasks.preprocessing import Preprocessor
from elastic_kfac.tasks.task import SumLoss

AttackKind = Literal["fgsm", "pgd", "l2"]
_KINDS: Final = ("fgsm", "pgd", "l2")
RANDOM_START: Final = 7
"""Purpose of counter-based draws; purposes below 5 belong to the data room."""


@dataclass(frozen=True)
class Attack:
    """The threat model and the search for the worst input.

    `fgsm` is one step x + ε·sign(∇ₓL) (Goodfellow et al. 2015); `pgd` iterates such steps inside the
    ε-ball of the maximum norm (Madry et al. 2018); `l2` steps along ∇ₓL/‖∇ₓL‖ inside the Euclidean
    ε-ball.
    """

    kind: AttackKind
    radius: float
    """ε, in units of the model's inputs (after normalisation)."""
    steps: int = 1
    step_size: float | None = None
    """None: ε for one step, 2.5·ε/steps for several."""
    random_start: bool = False
    """Start anywhere in the ball, as a function of (seed, counter, sample id)."""
    low: float | Tensor | None = None
    """Smallest input, a number or [channels, 1, 1]; None takes the minimum of the batch, as published,
    which depends on the other samples in it."""
    high: float | Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ConfigError("unknown attack", given=self.kind, allowed=", ".join(_KINDS))
        if not (math.isfinite(self.radius) and self.radius >= 0):
            raise ConfigError("attack radius out of range", given=self.radius, allowed="0 or more")
        if self.steps < 1 or (self.kind == "fgsm" and self.steps > 1):
            raise ConfigError(
                "attack steps out of range",
                given=self.steps,
                allowed="1 for fgsm, 1 or more for pgd and l2",
            )
        if self.step_size is not None and not self.step_size > 0:
            raise ConfigError("attack step_size must be positive", given=self.step_size)
        if (self.low is None) != (self.high is None):
            raise ConfigError("an attack needs both ends of the data range or none")
        if self.low is not None and self.high is not None:
            spread = torch.as_tensor(self.high) - torch.as_tensor(self.low)
            if bool((spread <= 0).any()):
                raise ConfigError("the data range of an attack is empty")
            # The Euclidean ball may be wider than one pixel's range.
            if self.kind != "l2" and self.radius > float(spread.max()):
                raise ConfigError(
                    "attack radius outside the data range",
                    given=self.radius,
                    allowed=f"0 to {float(spread.max()):g}",
                )

    @property
    def step(self) -> float:
        """Length of one step."""
        if self.step_size is not None:
            return self.step_size
        return self.radius if self.steps == 1 else 2.5 * self.radius / self.steps


def perturbed(
    model: nn.Module,
    loss_sum: SumLoss,
    inputs: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    ids: npt.NDArray[np.integer] | None = None,
    seed: int = 0,
    counter: int = 0,
) -> Tensor:
    """The attacked inputs [n, ...], clamped to the data range.

    Args:
        ids: Sample ids [n], for `random_start`.
        seed: Of the run, for `random_start`.
        counter: The step or the epoch, for `random_start`.
    """
    if attack.radius == 0 or not len(inputs):
        return inputs
    low = inputs.amin() if attack.low is None else _like(attack.low, inputs)
    high = inputs.amax() if attack.high is None else _like(attack.high, inputs)
    moved = inputs.detach()
    if attack.random_start:
        if ids is None:
            raise UsageError("a random start needs the ids of the samples")
        moved = moved + _start(attack, moved, stream_key(seed, counter, RANDOM_START), ids)
        moved = torch.clamp(moved, low, high)
    with evaluating(model), torch.enable_grad():
        for _ in range(attack.steps):
            variable = moved.detach().requires_grad_()
            loss = loss_sum(model(variable), labels)
            (gradient,) = torch.autograd.grad(loss, variable)
            moved = _project(attack, inputs, moved + attack.step * _direction(attack, gradient))
            moved = torch.clamp(moved, low, high)
    return moved.detach()


def _direction(attack: Attack, gradient: Tensor) -> Tensor:
    if attack.kind != "l2":
        return gradient.sign()
    norms = _norms(gradient)
    return torch.where(norms > 0, gradient / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0.0)


def _project(attack: Attack, inputs: Tensor, moved: Tensor) -> Tensor:
    if attack.kind != "l2":
        return inputs + (moved - inputs).clamp(-attack.radius, attack.radius)
    offset = moved - inputs
    norms = _norms(offset).clamp(min=torch.finfo(offset.dtype).tiny)
    return inputs + offset * (attack.radius / norms).clamp(max=1.0)


def _start(attack: Attack, inputs: Tensor, key: int, ids: npt.NDArray[np.integer]) -> Tensor:
    size = inputs[0].numel()
    draws = torch.from_numpy(uniforms(key, ids, size + 1)).to(inputs)
    offset = (2 * draws[:, :size] - 1).view(inputs.shape)
    if attack.kind != "l2":
        return attack.radius * offset
    # A direction from the cube fills the ball, if not evenly.
    lengths = attack.radius * draws[:, -1].view(-1, *[1] * (inputs.dim() - 1))
    return offset / _norms(offset) * lengths


def _norms(tensor: Tensor) -> Tensor:
    flat = torch.linalg.vector_norm(tensor.flatten(1), dim=1)
    return flat.view(-1, *[1] * (tensor.dim() - 1))


def _like(bound: float | Tensor, inputs: Tensor) -> Tensor:
    return torch.as_tensor(bound, dtype=inputs.dtype, device=inputs.device)


def adversarial_mask(
    first: int, count: int, global_count: int, *, micro_batch_size: int, fraction: float
) -> npt.NDArray[np.bool_]:
    """Which of `count` samples, from offset `first` of a step's global batch, are attacked [count].

    The first ⌊γ·size⌋ samples of each logical micro-batch of b0 samples (ABSA, Yao et al. 2018). Logical
    micro-batches are cut from the global batch, so the choice does not depend on ranks or real
    micro-batches.
    """
    offsets = np.arange(first, first + count)
    block, place = np.divmod(offsets, micro_batch_size)
    sizes = np.minimum(micro_batch_size, global_count - block * micro_batch_size)
    # A product such as 0.3 * 10 must not lose a sample to rounding.
    attacked: npt.NDArray[np.bool_] = place < np.floor(fraction * sizes + 1e-9)
    return attacked


def mix_adversarial(
    model: nn.Module,
    loss_sum: SumLoss,
    inputs: Tensor,
    labels: Tensor,
    mask: npt.NDArray[np.bool_],
    attack: Attack,
    *,
    ids: npt.NDArray[np.integer] | None = None,
    seed: int = 0,
    counter: int = 0,
    chunk_size: int | None = None,
) -> Tensor:
    """`inputs` with the samples of `mask` replaced by attacked ones [n, ...].

    Call it between steps, before the first pass, while running statistics hold their averages.
    """
    chosen = torch.from_numpy(np.flatnonzero(mask)).to(inputs.device)
    if not len(chosen):
        return inputs
    mixed = inputs.clone()
    for part in chosen.split(chunk_size or len(chosen)):
        mixed[part] = perturbed(
            model,
            loss_sum,
            inputs[part],
            labels[part],
            attack,
            ids=None if ids is None else ids[part.cpu().numpy()],
            seed=seed,
            counter=counter,
        )
    return mixed


def training_attack(
    config: AdversarialConfig, preprocess: Preprocessor, dataset: Dataset
) -> Attack | None:
    """The configured attack on training samples, or None.

    Raises:
        ConfigError: If its radius is outside the data range, or samples have no input that can be moved.
    """
    if config.attack == "none":
        return None
    check_one_tensor(dataset.columns, "adversarial.attack")
    low, high = data_range(config, preprocess, dataset)
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
    preprocess: Preprocessor,
    dataset: Dataset,
    kind: AttackKind | None = None,
    radius: float | None = None,
    steps: int | None = None,
) -> Attack | None:
    """The configured attack on evaluation samples, or None; arguments override the configuration.

    Raises:
        ConfigError: If its radius is outside the data range.
    """
    if kind is None:
        if config.eval_attack == "none":
            return None
        kind = config.eval_attack
    check_one_tensor(dataset.columns, "adversarial.eval_attack")
    low, high = data_range(config, preprocess, dataset)
    return Attack(
        kind,
        config.evaluation_radius if radius is None else radius,
        steps=config.eval_steps if steps is None else steps,
        low=low,
        high=high,
    )


def check_attacks(config: Config) -> None:
    """Checks the configured attacks before any worker starts.

    Raises:
        ConfigError: If a radius is outside the data range.
        DataError: If a split is missing or damaged.
    """
    adversarial = config.adversarial
    if adversarial.attack == adversarial.eval_attack == "none":
        return
    datasets = open_datasets(config)
    try:
        preprocess = Preprocessor(datasets.train, torch.float64, torch.device("cpu"))
        training_attack(adversarial, preprocess, datasets.train)
        if datasets.evaluation is not None:
            evaluation_attack(adversarial, preprocess, datasets.evaluation)
    finally:
        datasets.close()


def data_range(
    config: AdversarialConfig, preprocess: Preprocessor, dataset: Dataset
) -> tuple[float | Tensor, float | Tensor]:
    """Smallest and largest input: as configured, or of the pixels; infinite for other features.

    Never the range of a batch, which depends on the other samples in it.
    """
    if config.data_range is not None:
        return config.data_range
    if dataset.read(0, 0, 1).inputs.dtype == torch.uint8:
        return preprocess.pixel_range()
    return float("-inf"), float("inf")
