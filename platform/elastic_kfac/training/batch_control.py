"""The size of the batch: by schedule (`batch.policy`) or by the number of workers.

`batch.policy` follows epochs and curvature; `elastic.batch_policy` follows the workers. Only one of them
moves the batch in a run.

- `keep_global`: neither batch nor rate follows the workers.
- `abs`: the workers follow the batch. A batch that grows asks for workers; whether they come changes
  nothing but the time of a step.
- `keep_local`: every worker keeps its slice, so the batch is proportional to the workers, and the rate
  follows it by the linear scaling rule (Goyal et al. 2017, section 2.1), ramped after every change
  because a jump upwards is what diverges (section 2.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from elastic_kfac.config import Config
from elastic_kfac.optimizers.batch_size import (
    BatchDecision,
    BatchSizePolicy,
    Growth,
    make_policy,
    options_of,
    wanted_workers,
)

RAMP_EPOCHS = 1.0
"""How long the rate takes from its old to its new value."""


@dataclass
class WorldBatch:
    """Batch size and rate factor at a position; its state does not name a world size.

    `full_batch_size` is the global batch of `full_world_size` workers; a factor of 1 belongs to it.
    """

    kind: Literal["keep_global", "keep_local", "abs"]
    full_batch_size: int
    full_world_size: int
    num_samples: int
    """Of an epoch."""
    ramp_from: float = 1.0
    ramp_to: float = 1.0
    ramp_begin: int = 0
    """Samples of the run that were committed when the last ramp began."""
    begun: bool = False

    def batch_size(self, world_size: int) -> int:
        """Samples per step."""
        if self.kind != "keep_local":
            return self.full_batch_size
        return max(1, self.full_batch_size * world_size // self.full_world_size)

    def enter_world(self, world_size: int, position: int) -> None:
        """Notes the world in which the next step is taken; a change begins a ramp."""
        target = self.batch_size(world_size) / self.full_batch_size
        if not self.begun:
            self.ramp_from = self.ramp_to = target
            self.begun = True
        elif target != self.ramp_to:
            self.ramp_from = self.lr_factor(position)
            self.ramp_to = target
            self.ramp_begin = position

    def lr_factor(self, position: float) -> float:
        """What the scheduled rate is multiplied by."""
        done = (position - self.ramp_begin) / (RAMP_EPOCHS * self.num_samples)
        return self.ramp_from + (self.ramp_to - self.ramp_from) * min(max(done, 0.0), 1.0)

    def state_dict(self) -> dict[str, Any]:
        state = asdict(self)
        return {name: state[name] for name in ("ramp_from", "ramp_to", "ramp_begin", "begun")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class BatchControl:
    """Batch size, rate factor and attacked share at a position of the run."""

    def __init__(self, config: Config, num_samples: int) -> None:
        self._config = config
        self._num_samples = num_samples
        self.of_world = WorldBatch(
            config.elastic.batch_policy,
            full_batch_size=config.train.global_batch_size,
            full_world_size=config.elastic.max_workers,
            num_samples=num_samples,
        )
        self.schedule = schedule_policy(config)
        self.epochs = 0
        """Epochs whose end was noted."""

    @property
    def needs_eigenvalue(self) -> bool:
        """Whether the next end of an epoch uses an eigenvalue."""
        return self.schedule is not None and self.schedule.needs_eigenvalue

    def size(self, world_size: int, position: int) -> int:
        """Samples of the step that begins at `position`, if the epoch has so many left."""
        if self.schedule is None:
            return self.of_world.batch_size(world_size)
        return self._decision(position).batch_size

    def lr_factor(self, position: float) -> float:
        """What the scheduled rate is multiplied by."""
        if self.schedule is None:
            return self.of_world.lr_factor(position)
        return self._decision(position).lr_multiplier

    def attacked_fraction(self, position: int) -> float:
        """γ of the step that begins at `position`."""
        attacks = self._config.adversarial
        if attacks.attack == "none":
            return 0.0
        if self._config.batch.policy == "absa":
            return self._decision(position).adversarial_fraction
        stopped = attacks.stop_epoch is not None and position / self._num_samples >= (
            attacks.stop_epoch
        )
        return 0.0 if stopped else attacks.fraction

    def wanted_workers(self, position: int) -> int | None:
        """How many workers the batch keeps busy; None where it does not ask for any."""
        elastic, batch = self._config.elastic, self._config.batch
        if elastic.batch_policy != "abs":
            return None
        each = batch.samples_per_worker
        if each is None:
            each = -(-self._config.train.global_batch_size // elastic.min_workers)
        return wanted_workers(
            self._decision(position).batch_size,
            each,
            min_workers=elastic.min_workers,
            max_workers=elastic.max_workers,
        )

    def end_epoch(self, epoch: int, eigenvalue: float | None) -> Growth | None:
        """Notes that `epoch` epochs are complete; returns the growth that it brings."""
        self.epochs = epoch
        policy = self.schedule
        if policy is None:
            return None
        before = policy.at(epoch - 1e-9).batch_size
        growth = policy.end_epoch(epoch, eigenvalue)
        after = policy.at(epoch).batch_size
        if growth is None and after > before:
            return Growth(epoch, before, after, "schedule")
        return growth

    def _decision(self, position: float) -> BatchDecision:
        assert self.schedule is not None
        return self.schedule.at(position / self._num_samples)

    def state_dict(self) -> dict[str, Any]:
        """World-size-free."""
        policy = self.schedule
        return {
            "policy": self._config.batch.policy,
            "epochs": self.epochs,
            "state": {} if policy is None else policy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`; an empty one starts afresh."""
        if not state:
            return
        self.epochs = int(state["epochs"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["state"])


def schedule_policy(config: Config) -> BatchSizePolicy | None:
    """The policy of `batch.policy`; None is a constant batch.

    Raises:
        ConfigError: If its values do not fit.
    """
    batch, optimizer, attacks = config.batch, config.optimizer, config.adversarial
    if batch.policy == "constant":
        return None
    assert batch.max_batch_size is not None
    options: dict[str, Any] = {
        name: getattr(batch, name)
        for name in options_of(batch.policy) & set(type(batch).model_fields)
    }
    if batch.policy == "absa":
        options |= {"adversarial_fraction": attacks.fraction, "adversarial_decay": attacks.decay}
        if attacks.stop_epoch is not None:
            options["adversarial_stop_epoch"] = attacks.stop_epoch
    return make_policy(
        batch.policy,
        base_batch_size=config.train.global_batch_size,
        max_batch_size=batch.max_batch_size,
        total_epochs=config.train.epochs,
        decay_epochs=optimizer.decay_epochs if optimizer.lr_schedule == "step" else (),
        decay_factor=optimizer.decay_factor,
        **options,
    )
