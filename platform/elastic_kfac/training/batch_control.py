"""Who says how large a batch is: the policy of the run's course, and that of its world.

`batch.policy` follows epochs and curvature and knows no world; `elastic.batch_policy` follows the
workers. Only one of them moves the batch in a run. With `elastic.batch_policy: abs` a batch that grows
asks for workers; whether they come changes nothing but the time that a step takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic_kfac.config import Config
from elastic_kfac.errors import StateError
from elastic_kfac.optimizers.batch_size import (
    BatchDecision,
    BatchSizePolicy,
    Growth,
    make_policy,
    wanted_workers,
)
from elastic_kfac.training.batch_policy import BatchPolicy


class BatchControl:
    """Batch size, rate factor and attacked share at a position of the run."""

    def __init__(self, config: Config, num_samples: int) -> None:
        self._config = config
        self._num_samples = num_samples
        self.of_world = BatchPolicy(
            config.elastic.batch_policy,
            full_batch_size=config.train.global_batch_size,
            full_world_size=config.elastic.max_workers,
            num_samples=num_samples,
        )
        self.of_course = course_policy(config)
        self.epochs = 0
        """Epochs whose end was noted."""

    @property
    def needs_eigenvalue(self) -> bool:
        """Whether the next end of an epoch uses an eigenvalue."""
        return self.of_course is not None and self.of_course.needs_eigenvalue

    def size(self, world_size: int, position: int) -> int:
        """Samples of the step that begins at `position`, if the epoch has so many left."""
        if self.of_course is None:
            return self.of_world.batch_size(world_size)
        return self._decision(position).batch_size

    def lr_factor(self, position: float) -> float:
        """What the scheduled rate is multiplied by."""
        if self.of_course is None:
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
        policy = self.of_course
        if policy is None:
            return None
        before = policy.at(epoch - 1e-9).batch_size
        growth = policy.end_epoch(epoch, eigenvalue)
        after = policy.at(epoch).batch_size
        if growth is None and after > before:
            return Growth(epoch, before, after, "schedule")
        return growth

    def _decision(self, position: float) -> BatchDecision:
        assert self.of_course is not None
        return self.of_course.at(position / self._num_samples)

    def state_dict(self) -> dict[str, Any]:
        """World-size-free."""
        policy = self.of_course
        return {
            "policy": self._config.batch.policy,
            "epochs": self.epochs,
            "state": {} if policy is None else policy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`; an empty one starts afresh.

        Raises:
            StateError: If the run was started with another policy.
        """
        if not state:
            return
        if state["policy"] != self._config.batch.policy:
            raise StateError(
                "batch.policy is not the one of the checkpoint",
                given=self._config.batch.policy,
                allowed=state["policy"],
                change="go on with that policy, or start a run under another name",
            )
        self.epochs = int(state["epochs"])
        if self.of_course is not None:
            self.of_course.load_state_dict(state["state"])


def course_policy(config: Config) -> BatchSizePolicy | None:
    """The policy of `batch.policy`; None is a constant batch.

    Raises:
        ConfigError: If its values do not fit.
    """
    batch, optimizer, attacks = config.batch, config.optimizer, config.adversarial
    if batch.policy == "constant":
        return None
    assert batch.max_batch_size is not None
    options: dict[str, Any] = {}
    if batch.policy == "fb":
        options = {"warmup_epochs": batch.warmup_epochs}
    elif batch.policy == "warmup":
        options = {"stages": batch.stages}
    elif batch.policy in ("abs", "absa"):
        options = {
            "eigenvalue_ratio": batch.eigenvalue_ratio,
            "growth": batch.growth,
            "patience_epochs": batch.patience_epochs,
        }
    if batch.policy == "absa":
        options |= {
            "adversarial_fraction": attacks.fraction,
            "adversarial_decay": attacks.decay,
        }
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
