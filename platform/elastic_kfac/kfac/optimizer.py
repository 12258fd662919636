"""K-FAC as a `torch.optim.Optimizer`: what trainers, schedulers and scalers expect to hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.kfac.kfac import KFAC


class KFACOptimizer(torch.optim.Optimizer):
    """Preconditions the gradients by K-FAC, then steps another optimizer.

        optimizer = KFACOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.7))
        loss.backward(); optimizer.step(); optimizer.zero_grad()

    Parameter groups, state and defaults are those of the inner optimizer, so that learning-rate
    schedules, `add_param_group` and its `foreach` or `fused` apply as always. Hooks of `step` may be
    registered on either. `state_dict()` holds K-FAC's state as a further entry, `kfac`.

    Args:
        model: What `KFAC` takes: a plain module, or one in DistributedDataParallel or `fully_shard`,
            before or after it is wrapped in the former.
        optimizer: A rule that is told only gradients, such as SGD or AdamW. It is stepped by this one.
        grad_scaler: The `torch.amp.GradScaler` that scales the loss. It must be given where gradients are
            unscaled before `scaler.step(optimizer)`, as for clipping; otherwise it is noticed.
        **options: Of `KFAC`, for example `damping`, `accumulation_steps` or `process_group`.

    Attributes:
        inner: The optimizer that makes the update.
        kfac: The preconditioner: `coverage()`, `metrics()`, `micro_batch()`, `sample_fisher()`.

    Raises:
        ConfigError: As `KFAC` does, and for an inner optimizer that evaluates the loss itself.
    """

    inner: torch.optim.Optimizer
    kfac: KFAC
    grad_scaler: torch.amp.GradScaler | None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        grad_scaler: torch.amp.GradScaler | None = None,
        **options: Any,
    ) -> None:
        right = (
            "write KFACOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.7))"
        )
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                "KFACOptimizer wraps an optimizer", given=type(optimizer).__name__, change=right
            )
        if isinstance(optimizer, torch.optim.LBFGS | KFACOptimizer):
            raise ConfigError(
                "the inner optimizer must be a rule that is told only gradients",
                given=type(optimizer).__name__,
                change=right,
            )
        for name in ("lr", "sharding", "tree"):
            if name in options:
                raise ConfigError(
                    f"KFACOptimizer has no option {name}",
                    change="set the inner optimizer's lr" if name == "lr" else "use KFAC itself",
                )
        # The state of an optimizer without parameters of its own: hooks, and the profiler's wrapper.
        self.__setstate__(
            {
                "inner": optimizer,
                "kfac": KFAC(model, lr=optimizer, **options),
                "grad_scaler": grad_scaler,
            }
        )

    # -- what the inner optimizer has -----------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the inner optimizer."""
        self.inner.add_param_group(param_group)

    def __repr__(self) -> str:
        return f"KFACOptimizer ({self.inner!r})"

    # -- one step -------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """A scaler that was not given hands over scaled gradients and their scale; one that was given
        unscales them itself."""
        return self.grad_scaler is None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Preconditions, then steps the inner optimizer. Collective.

        Args:
            closure: Called first, with gradients enabled: evaluates the loss and its gradients.

        Returns:
            What `closure` returned.

        Raises:
            UsageError: As `KFAC.step`; if gradients still carry the scale of a scaler, or their scale is
                not known.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        scale = self._scale()
        if scale is not None and self._overflowed():
            self.kfac.skip_step()
            return result
        if not self._changes_nothing():
            self.kfac.grad_scaler = None if scale is None else _TakenOff(scale)  # type: ignore[assignment]
            self.kfac.step()
        self.inner.step()
        return result

    def _scale(self) -> float | None:
        """What the loss was multiplied by; gradients do not carry it when this returns."""
        scaler = self.grad_scaler
        if scaler is not None and scaler.is_enabled():
            if scaler._per_optimizer_states[id(self)]["stage"] is OptState.READY:
                raise UsageError(
                    "the gradients still carry the loss scale",
                    change="call scaler.step(optimizer) instead of optimizer.step()",
                )
            return scaler.get_scale()
        if not hasattr(self, "found_inf"):  # set by a scaler for the time of its step
            return None
        scale = getattr(self, "grad_scale", None)
        if scale is None:
            raise UsageError(
                "a scaler that K-FAC does not know has unscaled the gradients",
                change="give it: KFACOptimizer(model, optimizer, grad_scaler=scaler)",
            )
        gradients = self._gradients()
        if gradients and not self._overflowed():
            torch._foreach_mul_(gradients, 1.0 / float(scale))
        return float(scale)

    def _overflowed(self) -> bool:
        return bool(getattr(self, "found_inf", False))

    def _gradients(self) -> list[Tensor]:
        parameters = (p for group in self.param_groups for p in group["params"])
        return [p.grad for p in parameters if p.grad is not None]

    def _changes_nothing(self) -> bool:
        """Whether there is nothing to precondition: no gradient at all, or gradients of 0 without a pass,
        by which torch's checkpoints make the state of an optimizer, at a rate of 0."""
        gradients = self._gradients()
        if not gradients:
            return True
        if not self.kfac.factors_due() or self.kfac.captured_samples():
            return False
        # Another rank may have seen samples; only a rate is sure to be the same there.
        alone = self.kfac.plan.world_size == 1
        if not alone and any(float(group.get("lr", 1.0)) for group in self.param_groups):
            return False
        return not any(bool(g.any()) for g in gradients)

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, and `kfac`. Collective as `KFAC.state_dict` is."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state: dict[str, Any] = {**self.inner.state_dict(), "kfac": self.kfac.state_dict()}
        for changed in self._optimizer_state_dict_post_hooks.values():
            result = changed(self, state)
            state = state if result is None else result
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from `state_dict()`; without `kfac`, as of the inner rule alone, K-FAC starts afresh
        and says so.

        Raises:
            StateError: As `KFAC.load_state_dict`; nothing is changed then.
        """
        state = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state)
            state = state if result is None else result
        curvature = state.pop("kfac", None)
        if curvature is not None:
            self.kfac.load_state_dict(curvature)
        else:
            warnings.warn(
                "the state holds no 'kfac': K-FAC starts afresh", UserWarning, stacklevel=2
            )
        self.inner.load_state_dict(state)
        for done in self._optimizer_load_state_dict_post_hooks.values():
            done(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner, "kfac": self.kfac, "grad_scaler": self.grad_scaler}


class _TakenOff:
    """What KFAC asks of a scaler whose scale gradients carry no more, but statistics do."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def get_scale(self) -> float:
        return self._scale

    def is_enabled(self) -> bool:
        """No: there is nothing left to unscale."""
        return False
