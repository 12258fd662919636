"""Batch-size policies: how batch, learning rate and adversarial share follow the progress of a run.

`bl`, `fb` and `gg` are fixed baselines, `abs` and `absa` follow the top Hessian eigenvalue (Yao et al.
2018), `warmup` follows a list. Policies see only epochs and eigenvalues, neither model nor ranks, so a
run takes the same decisions at every world size. Epochs are completed epochs: a milestone of 30 acts from
the first step of the 31st on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from elastic_kfac.errors import ConfigError, StateError


@dataclass(frozen=True)
class BatchDecision:
    """The values in force at a position of the run."""

    batch_size: int
    """Samples of an optimizer step over all ranks."""
    lr_multiplier: float
    """Factor of the base rate, which belongs to the base batch; decay epochs are included."""
    adversarial_fraction: float = 0.0
    """γ: attacked share of each micro-batch."""


@dataclass(frozen=True)
class Growth:
    """An increase of the batch, and its reason."""

    epoch: int
    old_batch_size: int
    new_batch_size: int
    reason: Literal["eigenvalue", "duration", "schedule"]


def wanted_workers(
    batch_size: int, samples_per_worker: int, *, min_workers: int = 1, max_workers: int
) -> int:
    """N' = min(N_max, b' / n_target): the number of workers that a batch keeps busy.

    Raises:
        ConfigError: If `samples_per_worker` is not positive.
    """
    if samples_per_worker < 1:
        raise ConfigError("samples per worker must be positive", given=samples_per_worker)
    return max(min_workers, min(max_workers, batch_size // samples_per_worker))


@dataclass
class BatchSizePolicy(ABC):
    """Decides before a step; may react to an eigenvalue after an epoch.

    Raises:
        ConfigError: If a value is out of range.
    """

    base_batch_size: int
    max_batch_size: int
    decay_epochs: Sequence[float] = ()
    decay_factor: float = 0.2
    name: str = field(init=False)

    def __post_init__(self) -> None:
        if self.base_batch_size < 1:
            raise ConfigError("the base batch size must be positive", given=self.base_batch_size)
        if self.max_batch_size < self.base_batch_size:
            raise ConfigError(
                "the batch cap is below the base batch",
                given=self.max_batch_size,
                allowed=f"{self.base_batch_size} or more",
            )
        if not 0 < self.decay_factor <= 1:
            raise ConfigError(
                "decay_factor out of range", given=self.decay_factor, allowed="0 < factor <= 1"
            )

    @abstractmethod
    def at(self, epoch: float) -> BatchDecision:
        """The decision at a fractional epoch."""

    @property
    def needs_eigenvalue(self) -> bool:
        """Whether `end_epoch` would use an eigenvalue."""
        return False

    def end_epoch(self, epoch: int, eigenvalue: float | None = None) -> Growth | None:
        """Records that `epoch` epochs are complete; returns the growth that follows, if any."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """State of a resumed run; independent of the world size."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from `state_dict()`.

        Raises:
            StateError: If it is the state of another kind of policy.
        """
        if state:
            raise StateError(
                f"batch-size policy {self.name} has no state",
                given=sorted(state),
                change="continue with the policy that the run was started with",
            )

    def decays(self, epoch: float) -> int:
        """Number of decay epochs passed."""
        return sum(epoch >= milestone for milestone in self.decay_epochs)

    def decay(self, epoch: float) -> float:
        """Factor of the rate after the decay epochs passed."""
        return float(self.decay_factor) ** self.decays(epoch)

    def proportional(self, epoch: float, batch: int) -> BatchDecision:
        """A batch whose rate, before decay, is proportional to it."""
        return BatchDecision(batch, self.decay(epoch) * batch / self.base_batch_size)


@dataclass
class LargeBatch(BatchSizePolicy):
    """BL: the cap from the start, with the rate and schedule of the small batch."""

    name: str = field(default="bl", init=False)

    def at(self, epoch: float) -> BatchDecision:
        return BatchDecision(self.max_batch_size, self.decay(epoch))


@dataclass
class LinearScaling(BatchSizePolicy):
    """FB: the cap from the start, rate lr·B/b0 after a linear warm-up (Goyal et al. 2017)."""

    name: str = field(default="fb", init=False)
    warmup_epochs: float = field(default=5.0, kw_only=True)

    def at(self, epoch: float) -> BatchDecision:
        scale = self.max_batch_size / self.base_batch_size
        if epoch < self.warmup_epochs:
            scale = 1 + (scale - 1) * max(epoch, 0.0) / self.warmup_epochs
        return BatchDecision(self.max_batch_size, scale * self.decay(epoch))


@dataclass
class GrowInsteadOfDecay(BatchSizePolicy):
    """GG: where the rate would decay by ρ the batch grows by 1/ρ (Smith et al. 2018).

    The rate absorbs growth beyond the cap: lr ← lr·ρ·(b'/b).
    """

    name: str = field(default="gg", init=False)

    def at(self, epoch: float) -> BatchDecision:
        batch = self.base_batch_size
        for _ in range(self.decays(epoch)):
            batch = min(round(batch / self.decay_factor), self.max_batch_size)
        return self.proportional(epoch, batch)


@dataclass
class BatchWarmup(BatchSizePolicy):
    """A list of (from epoch, batch size), never falling; the rate is proportional to the batch."""

    name: str = field(default="warmup", init=False)
    stages: Sequence[tuple[float, int]] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stages = tuple((float(epoch), int(batch)) for epoch, batch in self.stages)
        epochs = [epoch for epoch, _ in self.stages]
        sizes = [self.base_batch_size, *(batch for _, batch in self.stages)]
        if epochs != sorted(epochs) or sizes != sorted(sizes) or sizes[-1] > self.max_batch_size:
            raise ConfigError(
                "batch-size warm-up needs ascending epochs and batches that never fall",
                given=list(self.stages),
                allowed=f"batches from {self.base_batch_size} to {self.max_batch_size}",
            )

    def at(self, epoch: float) -> BatchDecision:
        reached = [size for begin, size in self.stages if epoch >= begin]
        return self.proportional(epoch, reached[-1] if reached else self.base_batch_size)


@dataclass
class HessianAdaptive(BatchSizePolicy):
    """ABS and ABSA: the batch grows when the loss surface has flattened (Yao et al. 2018).

    The top eigenvalue is measured after every epoch until the cap is reached. When it has fallen by
    `eigenvalue_ratio` since the last such growth, or when the batch has not changed for
    `patience_epochs`, the batch is multiplied by `growth`; the rate follows the batch. γ shrinks with
    every growth and ends at the cap, or at `adversarial_stop_epoch`.

    Args:
        eigenvalue_ratio: α.
        growth: β.
        patience_epochs: κ.
        adversarial_fraction: γ at the start; 0 is ABS.
        adversarial_decay: ω.
        adversarial_stop_epoch: Epochs after which γ is 0; None keeps it.
    """

    eigenvalue_ratio: float = field(default=2.0, kw_only=True)
    growth: float = field(default=2.0, kw_only=True)
    patience_epochs: int = field(default=10, kw_only=True)
    adversarial_fraction: float = field(default=0.0, kw_only=True)
    adversarial_decay: float = field(default=2.0, kw_only=True)
    adversarial_stop_epoch: float | None = field(default=None, kw_only=True)
    batch_size: int = field(init=False)
    reference: float | None = field(default=None, init=False)
    """λ_ref: the eigenvalue that the next one is compared with."""
    duration: int = field(default=0, init=False)
    """Epochs since the last growth."""
    epochs: int = field(default=0, init=False)
    """Epochs recorded; recording one again after a restart changes nothing."""
    negative_curvature: int = field(default=0, init=False)
    """Negative eigenvalues: measurements at a saddle."""
    missing: int = field(default=0, init=False)
    """Epochs without a usable eigenvalue."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eigenvalue_ratio", "growth", "adversarial_decay"):
            if not getattr(self, name) > 1:
                raise ConfigError(
                    f"{name} out of range", given=getattr(self, name), allowed="above 1"
                )
        if int(self.base_batch_size * self.growth) == self.base_batch_size:
            raise ConfigError("growth leaves the base batch as it is", given=self.growth)
        if self.patience_epochs < 1:
            raise ConfigError("patience_epochs must be positive", given=self.patience_epochs)
        if not 0 <= self.adversarial_fraction <= 1:
            raise ConfigError(
                "adversarial_fraction out of range",
                given=self.adversarial_fraction,
                allowed="0 to 1",
            )
        self.name = "absa" if self.adversarial_fraction > 0 else "abs"
        self.batch_size = self.base_batch_size

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
        # Power iteration finds the largest |λ|; on a saddle its sign does not measure sharpness.
        self.negative_curvature += eigenvalue < 0
        magnitude = abs(eigenvalue)
        grown = None
        if self.reference is None:
            self.reference = magnitude
        elif magnitude <= self.reference / self.eigenvalue_ratio:
            self.reference = magnitude
            grown = self._grow(epoch, "eigenvalue")
        if self.duration >= self.patience_epochs and self.needs_eigenvalue:
            # As published, this growth does not change the reference.
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
        """Resumes from `state_dict()`.

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


def options_of(name: str) -> set[str]:
    """Names of the options that only some policies have."""
    return {option.name for option in fields(_KINDS[name]) if option.kw_only and option.init}


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

    `absa` defaults to γ = 0.2 and to no attacks after half of `total_epochs`.

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
