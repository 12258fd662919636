"""Batch-size policies: how batch, learning rate and adversarial share follow the course of a run.

`bl`, `fb` and `gg` are the fixed baselines, `abs` and `absa` follow the top Hessian eigenvalue (Yao et
al. 2018), `warmup` follows a list. All are controllers without a model: they are told the epoch and an
eigenvalue, and they know nothing of ranks, so that a run decides alike at every world size. Epochs are
counted in completed epochs: a milestone of 30 acts from the first step of the 31st on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from elastic_kfac.errors import ConfigError, StateError

PolicyName = Literal["bl", "fb", "gg", "abs", "absa", "warmup"]


@dataclass(frozen=True)
class BatchDecision:
    """What is in force at a position of the run."""

    batch_size: int
    """Samples of an optimizer step over all ranks."""
    lr_multiplier: float
    """Of the base rate, which belongs to the base batch; decay epochs are included."""
    adversarial_fraction: float = 0.0
    """γ: share of each micro-batch that is attacked."""


@dataclass(frozen=True)
class Growth:
    """An increase of the batch, and why."""

    epoch: int
    old_batch_size: int
    new_batch_size: int
    reason: Literal["eigenvalue", "duration", "schedule"]


def wanted_workers(
    batch_size: int, samples_per_worker: int, *, min_workers: int = 1, max_workers: int
) -> int:
    """N' = min(N_max, b' / n_target): the workers that a batch keeps busy (spec 5.5).

    Raises:
        ConfigError: If `samples_per_worker` is not positive.
    """
    if samples_per_worker < 1:
        raise ConfigError("samples per worker must be positive", given=samples_per_worker)
    return max(min_workers, min(max_workers, batch_size // samples_per_worker))


class BatchSizePolicy(ABC):
    """A controller: asked for a decision before a step, told an eigenvalue after an epoch."""

    name: PolicyName

    def __init__(
        self,
        base_batch_size: int,
        max_batch_size: int,
        decay_epochs: Sequence[float] = (),
        decay_factor: float = 0.2,
    ) -> None:
        if base_batch_size < 1:
            raise ConfigError("the base batch size must be positive", given=base_batch_size)
        if max_batch_size < base_batch_size:
            raise ConfigError(
                "the batch cap is below the base batch",
                given=max_batch_size,
                allowed=f"{base_batch_size} or more",
            )
        if not 0 < decay_factor <= 1:
            raise ConfigError(
                "decay_factor out of range", given=decay_factor, allowed="0 < factor <= 1"
            )
        self.base_batch_size = base_batch_size
        self.max_batch_size = max_batch_size
        self.decay_epochs = tuple(decay_epochs)
        self.decay_factor = decay_factor

    @abstractmethod
    def at(self, epoch: float) -> BatchDecision:
        """What is in force at a fractional epoch."""

    @property
    def needs_eigenvalue(self) -> bool:
        """Whether `end_epoch` would use an eigenvalue."""
        return False

    def end_epoch(self, epoch: int, eigenvalue: float | None = None) -> Growth | None:
        """Notes that `epoch` epochs are complete; returns the growth that follows from it."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs; it names no world size."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`.

        Raises:
            StateError: If it is the state of another kind of policy.
        """
        if state:
            raise StateError(
                f"batch-size policy {self.name} has no state",
                given=sorted(state),
                change="go on with the policy that the run was started with",
            )

    def decays(self, epoch: float) -> int:
        """How many decay epochs have passed."""
        return sum(epoch >= milestone for milestone in self.decay_epochs)

    def decay(self, epoch: float) -> float:
        """Factor of the rate that the decay epochs leave."""
        return float(self.decay_factor) ** self.decays(epoch)


class LargeBatch(BatchSizePolicy):
    """BL: the cap from the start, with the small batch's rate and schedule (spec 5.1)."""

    name: PolicyName = "bl"

    def at(self, epoch: float) -> BatchDecision:
        return BatchDecision(self.max_batch_size, self.decay(epoch))


class LinearScaling(BatchSizePolicy):
    """FB: the cap from the start, rate lr·B/b0 after a linear warm-up (Goyal et al. 2017)."""

    name: PolicyName = "fb"

    def __init__(self, *arguments: Any, warmup_epochs: float = 5.0, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.warmup_epochs = warmup_epochs

    def at(self, epoch: float) -> BatchDecision:
        scale = self.max_batch_size / self.base_batch_size
        if epoch < self.warmup_epochs:
            scale = 1 + (scale - 1) * max(epoch, 0.0) / self.warmup_epochs
        return BatchDecision(self.max_batch_size, scale * self.decay(epoch))


class GrowInsteadOfDecay(BatchSizePolicy):
    """GG: where the rate would decay by ρ the batch grows by 1/ρ (Smith et al. 2018).

    Growth that the cap cuts off goes to the rate: lr ← lr·ρ·(b'/b).
    """

    name: PolicyName = "gg"

    def at(self, epoch: float) -> BatchDecision:
        batch = self.batch_after(self.decays(epoch))
        return BatchDecision(batch, self.decay(epoch) * batch / self.base_batch_size)

    def batch_after(self, decays: int) -> int:
        """The batch once `decays` decay epochs have passed."""
        batch = self.base_batch_size
        for _ in range(decays):
            batch = min(round(batch / self.decay_factor), self.max_batch_size)
        return batch


class BatchWarmup(BatchSizePolicy):
    """A list of (from epoch, batch size), never falling; the rate is proportional to the batch."""

    name: PolicyName = "warmup"

    def __init__(
        self,
        base_batch_size: int,
        max_batch_size: int,
        decay_epochs: Sequence[float] = (),
        decay_factor: float = 0.2,
        *,
        stages: Sequence[tuple[float, int]],
    ) -> None:
        super().__init__(base_batch_size, max_batch_size, decay_epochs, decay_factor)
        self.stages = tuple((float(epoch), int(batch)) for epoch, batch in stages)
        epochs = [epoch for epoch, _ in self.stages]
        sizes = [base_batch_size, *(batch for _, batch in self.stages)]
        if epochs != sorted(epochs) or sizes != sorted(sizes) or sizes[-1] > max_batch_size:
            raise ConfigError(
                "batch-size warm-up needs ascending epochs and batches that never fall",
                given=list(self.stages),
                allowed=f"batches from {base_batch_size} to {max_batch_size}",
            )

    def at(self, epoch: float) -> BatchDecision:
        batch = self.base_batch_size
        for begin, size in self.stages:
            if epoch >= begin:
                batch = size
        return BatchDecision(batch, self.decay(epoch) * batch / self.base_batch_size)


class HessianAdaptive(BatchSizePolicy):
    """ABS and ABSA: the batch grows when the loss surface has flattened (spec 5.1).

    The top eigenvalue is measured after every epoch until the cap is reached. When it has fallen by
    `eigenvalue_ratio` since the last such growth, or when the batch has stood for `patience_epochs`,
    the batch is multiplied by `growth`; the rate follows the batch. γ shrinks with every growth and
    ends at the cap, or at `adversarial_stop_epoch`.

    Args:
        eigenvalue_ratio: α.
        growth: β.
        patience_epochs: κ.
        adversarial_fraction: γ at the start; 0 is ABS.
        adversarial_decay: ω.
        adversarial_stop_epoch: Epochs after which γ is 0; None keeps it.

    Raises:
        ConfigError: If a value is out of range.
    """

    def __init__(
        self,
        base_batch_size: int,
        max_batch_size: int,
        decay_epochs: Sequence[float] = (),
        decay_factor: float = 0.2,
        *,
        eigenvalue_ratio: float = 2.0,
        growth: float = 2.0,
        patience_epochs: int = 10,
        adversarial_fraction: float = 0.0,
        adversarial_decay: float = 2.0,
        adversarial_stop_epoch: float | None = None,
    ) -> None:
        super().__init__(base_batch_size, max_batch_size, decay_epochs, decay_factor)
        for name, value in (
            ("eigenvalue_ratio", eigenvalue_ratio),
            ("growth", growth),
            ("adversarial_decay", adversarial_decay),
        ):
            if not value > 1:
                raise ConfigError(f"{name} out of range", given=value, allowed="above 1")
        if int(base_batch_size * growth) == base_batch_size:
            raise ConfigError("growth leaves the base batch as it is", given=growth)
        if patience_epochs < 1:
            raise ConfigError("patience_epochs must be positive", given=patience_epochs)
        if not 0 <= adversarial_fraction <= 1:
            raise ConfigError(
                "adversarial_fraction out of range", given=adversarial_fraction, allowed="0 to 1"
            )
        self.name = "absa" if adversarial_fraction > 0 else "abs"
        self.eigenvalue_ratio = eigenvalue_ratio
        self.growth = growth
        self.patience_epochs = patience_epochs
        self.adversarial_decay = adversarial_decay
        self.adversarial_stop_epoch = adversarial_stop_epoch
        self.batch_size = base_batch_size
        self.adversarial_fraction = adversarial_fraction
        self.reference: float | None = None
        """λ_ref: the eigenvalue that the next one is compared with."""
        self.duration = 0
        """Epochs since the last growth."""
        self.epochs = 0
        """Epochs that were noted; one that is noted again after a restart changes nothing."""
        self.negative_curvature = 0
        """Eigenvalues that were negative: the measurement stood on a saddle."""
        self.missing = 0
        """Epochs without a usable eigenvalue."""

    @property
    def needs_eigenvalue(self) -> bool:
        return self.batch_size < self.max_batch_size

    def at(self, epoch: float) -> BatchDecision:
        stopped = self.adversarial_stop_epoch is not None and epoch >= self.adversarial_stop_epoch
        return BatchDecision(
            self.batch_size,
            self.decay(epoch) * self.batch_size / self.base_batch_size,
            0.0 if stopped else self.adversarial_fraction,
        )

    def end_epoch(self, epoch: int, eigenvalue: float | None = None) -> Growth | None:
        """Applies the growth rule; None or NaN means that nothing could be measured.

        Such an epoch counts towards the duration but does not grow the batch.
        """
        if epoch <= self.epochs:
            return None
        self.epochs = epoch
        if not self.needs_eigenvalue:
            return None
        self.duration += 1
        if eigenvalue is None or not math.isfinite(eigenvalue):
            self.missing += 1
            return None
        # Power iteration finds the largest |λ|; on a saddle its sign says nothing about sharpness.
        self.negative_curvature += eigenvalue < 0
        size = abs(eigenvalue)
        grown = None
        if self.reference is None:
            self.reference = size
        elif size <= self.reference / self.eigenvalue_ratio:
            self.reference = size
            grown = self._grow(epoch, "eigenvalue")
        if self.duration >= self.patience_epochs and self.needs_eigenvalue:
            # The published rule leaves the reference where it is (spec E-14).
            grown = self._grow(epoch, "duration")
        return grown

    def _grow(self, epoch: int, reason: Literal["eigenvalue", "duration"]) -> Growth:
        old = self.batch_size
        self.batch_size = min(int(old * self.growth), self.max_batch_size)
        self.duration = 0
        if self.batch_size == self.max_batch_size:
            self.adversarial_fraction = 0.0
        else:
            self.adversarial_fraction /= self.adversarial_decay
        return Growth(epoch, old, self.batch_size, reason)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`.

        Raises:
            StateError: If it is not the state of such a policy, or its batch is outside the limits.
        """
        if set(state) != set(_STATE):
            raise StateError(
                "not the state of a Hessian-adaptive batch policy", given=sorted(state)
            )
        if not self.base_batch_size <= state["batch_size"] <= self.max_batch_size:
            raise StateError(
                "the saved batch is outside the configured limits",
                given=state["batch_size"],
                allowed=f"{self.base_batch_size} to {self.max_batch_size}",
            )
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = (
    "batch_size",
    "adversarial_fraction",
    "reference",
    "duration",
    "epochs",
    "negative_curvature",
    "missing",
)

_KINDS: Mapping[str, type[BatchSizePolicy]] = {
    "bl": LargeBatch,
    "fb": LinearScaling,
    "gg": GrowInsteadOfDecay,
    "abs": HessianAdaptive,
    "absa": HessianAdaptive,
    "warmup": BatchWarmup,
}


def make_policy(
    name: str,
    *,
    base_batch_size: int,
    max_batch_size: int,
    total_epochs: float | None = None,
    decay_epochs: Sequence[float] = (),
    decay_factor: float = 0.2,
    **options: Any,
) -> BatchSizePolicy:
    """The policy of a name; `options` are those of its class.

    `absa` starts with γ = 0.2 and stops attacking after half of `total_epochs` unless told otherwise.

    Raises:
        ConfigError: If the name is unknown, an option does not fit, or a value is out of range.
    """
    if name not in _KINDS:
        raise ConfigError("unknown batch-size policy", given=name, allowed=", ".join(_KINDS))
    if name == "absa":
        options.setdefault("adversarial_fraction", 0.2)
        if total_epochs is not None:
            options.setdefault("adversarial_stop_epoch", total_epochs / 2)
        if options["adversarial_fraction"] == 0:
            raise ConfigError("absa without adversarial samples", change="use abs")
    if name == "abs" and options.get("adversarial_fraction"):
        raise ConfigError("abs has no adversarial samples", change="use absa")
    try:
        return _KINDS[name](base_batch_size, max_batch_size, decay_epochs, decay_factor, **options)
    except TypeError as error:
        raise ConfigError(f"options do not fit batch-size policy {name}: {error}") from None
