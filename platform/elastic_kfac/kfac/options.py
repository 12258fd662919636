"""Options of KFAC as Python keywords: validation, help, values at a step."""

from __future__ import annotations

import difflib
import inspect
import math
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any, TypeVar

import torch
from torch import nn
from torch.amp.grad_scaler import OptState

from elastic_kfac.config.kfac import RANGES, KfacOptions, LevenbergMarquardt, ScriptOptions
from elastic_kfac.config.section import ValidationError
from elastic_kfac.curvature.damping import AdaptiveDamping
from elastic_kfac.curvature.layer import Layer
from elastic_kfac.errors import ConfigError, UsageError

Class = TypeVar("Class", bound=type)


def make_options(config: KfacOptions | None, options: Mapping[str, Any]) -> ScriptOptions:
    """The options of `config`, or the defaults, with keywords in their place.

    Raises:
        ConfigError: With the keyword, its value, and what is allowed.
    """
    known = ScriptOptions.model_fields
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"KFAC has no option {name}",
                allowed=", ".join(sorted(known)),
                change=f"did you mean {close[0]}?" if close else None,
            )
    # NumPy's numbers count as Python's.
    options = {n: v.item() if _is_of_numpy(v) else v for n, v in options.items()}
    given = {} if config is None else type(config).model_fields
    values = {name: getattr(config, name) for name in given if name in known}
    if "kl_clip" in options:
        values.pop("trust_region", None)
    try:
        made = ScriptOptions.model_validate({**values, **options})
    except ValidationError as error:
        problems = error.errors()
        location = problems[0]["loc"]
        texts = [p["msg"].removeprefix("Input should be ") for p in problems]
        if not location:
            raise ConfigError(texts[0].removeprefix("Value error, ")) from None
        same = [t for t, p in zip(texts, problems, strict=True) if p["loc"][:1] == location[:1]]
        raise ConfigError(
            f"{location[0]} is out of range",
            given=options.get(str(location[0])),
            allowed=" or ".join(dict.fromkeys(same)),
        ) from None
    inverse, factor = made.inverse_update_steps, made.factor_update_steps
    if isinstance(inverse, int) and isinstance(factor, int) and inverse % factor:
        warnings.warn(
            f"inverse_update_steps={inverse} is no multiple of factor_update_steps={factor}: some "
            "decompositions see no new factors",
            UserWarning,
            stacklevel=3,
        )
    return made


def _is_of_numpy(value: Any) -> bool:
    """Whether a value is a scalar of NumPy, which need not be installed."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic)


def damping_rule(options: KfacOptions) -> AdaptiveDamping | None:
    """The rule that adapts the damping, if there is one."""
    rule = options.damping
    return AdaptiveDamping(rule) if isinstance(rule, LevenbergMarquardt) else None


def value_at(options: KfacOptions, name: str, step: int) -> float:
    """A number or schedule at a step; the initial value of an adaptive rule.

    Raises:
        ConfigError: If the schedule leaves the option's range.
    """
    value = getattr(options, name)
    if isinstance(value, LevenbergMarquardt):
        return value.initial
    if not callable(value):
        return float(value)
    result = value(step)
    try:
        return float(RANGES[name].validate_python(result))
    except ValidationError as error:
        raise ConfigError(
            f"{name} at step {step} is out of range",
            given=result,
            allowed=error.errors()[0]["msg"].removeprefix("Input should be "),
        ) from None


Lr = float | Callable[[int], float] | torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


_Groups = list[dict[str, Any]]
_Known = tuple[Sequence[Layer], _Groups, list[int], list[_Groups]]
"""Layers, all parameter groups and their sizes, and the groups of each layer."""


class Rates:
    """The learning rate that steps are measured by, and that of the update where K-FAC makes it."""

    def __init__(self, lr: Lr) -> None:
        self.optimizers: tuple[torch.optim.Optimizer, ...] = ()
        """Those whose parameter groups hold the rates, if any."""
        self._number: float | Callable[[int], float] = 0.0
        self._known: _Known | None = None
        if isinstance(lr, torch.optim.Optimizer):
            self.optimizers = (lr,)
        elif isinstance(lr, Sequence) and all(isinstance(o, torch.optim.Optimizer) for o in lr):
            self.optimizers = tuple(lr)
        else:
            self._number = lr if callable(lr) else _checked_rate(lr)

    def of_layers(self, layers: Sequence[Layer], step: int) -> list[float]:
        """The largest rate among each layer's parameters: the clip's bound holds for all of them.

        Raises:
            ConfigError: If no optimizer holds one of the parameters.
        """
        if not self.optimizers:
            return [self._at(step)] * len(layers)
        return [max(float(group["lr"]) for group in groups) for groups in self._by_layer(layers)]

    @property
    def are_linear(self) -> bool:
        """Whether an update is −lr (P + momentum times the last one), as far as is known."""
        return all(
            isinstance(x, torch.optim.SGD) and not any(g["dampening"] for g in x.param_groups)
            for x in self.optimizers
        )

    def momenta(self, layers: Sequence[Layer]) -> list[float]:
        """The largest momentum (β₁ of Adam) among each layer's parameters; 0 without an optimizer."""
        if not self.optimizers:
            return [0.0] * len(layers)
        return [max(_momentum(group) for group in groups) for groups in self._by_layer(layers)]

    def of_parameters(
        self, parameters: Iterable[nn.Parameter], step: int
    ) -> list[tuple[float, float]]:
        """(rate, momentum) of each parameter; no momentum without an optimizer."""
        if not self.optimizers:
            return [(self._at(step), 0.0) for _ in parameters]
        groups = self._groups()
        try:
            found = [groups[id(p)] for p in parameters]
        except KeyError:
            raise _not_held("all trainable parameters of the model") from None
        return [(float(group["lr"]), float(group.get("momentum", 0.0))) for group in found]

    def require_unscaled(self, scaler: torch.amp.GradScaler) -> None:
        """Raises UsageError if gradients still carry the scale of `scaler`, as far as can be known."""
        for optimizer in self.optimizers if scaler.is_enabled() else ():
            if scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
                raise UsageError(
                    "the gradients still carry the loss scale",
                    change="call scaler.unscale_(optimizer) before KFAC.step()",
                )

    def tell_overflow(self, scaler: torch.amp.GradScaler) -> None:
        """Makes `scaler` skip the coming steps: it has seen only gradients, or pieces, of this rank."""
        for optimizer in self.optimizers if scaler.is_enabled() else ():
            for found in scaler._per_optimizer_states[id(optimizer)][
                "found_inf_per_device"
            ].values():
                found.fill_(1.0)

    def _by_layer(self, layers: Sequence[Layer]) -> list[_Groups]:
        """The parameter groups of each layer, each group once."""
        found = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        sizes = [len(group["params"]) for group in found]
        if self._known is not None:
            known, its_groups, its_sizes, result = self._known
            if known is layers and its_sizes == sizes and all(map(is_, its_groups, found)):
                return result
        groups = self._groups()
        for layer in layers:
            if any(id(p) not in groups for p in layer.parameters):
                raise _not_held(f"the weight of layer {layer.name}")
        result = [
            [*{id(groups[id(p)]): groups[id(p)] for p in layer.parameters}.values()]
            for layer in layers
        ]
        self._known = layers, found, sizes, result
        return result

    def _groups(self) -> dict[int, dict[str, Any]]:
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return {id(p): group for group in groups for p in group["params"]}

    def _at(self, step: int) -> float:
        if callable(self._number):
            return _checked_rate(self._number(step), f" at step {step}")
        return self._number


def _not_held(what: str) -> ConfigError:
    return ConfigError(
        f"the optimizer given as lr does not hold {what}",
        change="build the optimizer over all parameters of the model, or give all optimizers: "
        "lr=[first, second]",
    )


def _momentum(group: Mapping[str, Any]) -> float:
    return float(group.get("momentum", group.get("betas", (0.0,))[0]))


def _checked_rate(lr: Any, where: str = "") -> float:
    try:
        if not isinstance(lr, str) and 0 <= float(lr) < math.inf:
            return float(lr)
    except (TypeError, ValueError):
        pass
    change = None
    if isinstance(lr, torch.optim.lr_scheduler.LRScheduler | Sequence):
        change = "give the optimizer, whose rate a scheduler changes: lr=optimizer"
    raise ConfigError(
        f"lr{where} is out of range",
        given=lr,
        allowed="a finite number >= 0, or an optimizer",
        change=change,
    )


def check_arguments(model: object, config: object) -> None:
    """Refuses what other libraries take in these places (parameters, an optimizer, a rate), and a model
    that has no numbers yet.

    Raises:
        ConfigError: With the right call.
    """
    right = "write KFAC(model, lr=optimizer)"
    if not isinstance(model, nn.Module):
        raise ConfigError("KFAC takes the model itself", given=type(model).__name__, change=right)
    if empty := next((name for name, p in model.named_parameters() if p.is_meta), None):
        raise ConfigError(
            "the model has parameters without numbers",
            given=f"{empty} on the meta device",
            change="model.to_empty(device=...) and load or initialise the weights, then build KFAC",
        )
    if config is not None and not hasattr(type(config), "model_fields"):
        raise ConfigError(
            "the second argument of KFAC is a section of options",
            given=type(config).__name__,
            change=right,
        )


def takes_options(kind: Class) -> Class:
    """Gives a class whose constructor ends in `**options` their names, defaults and help text."""
    own = list(inspect.signature(kind.__init__).parameters.values())[1:-1]  # type: ignore[misc]
    fields = ScriptOptions.model_fields
    keywords = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.annotation
        )
        for name, field in fields.items()
    ]
    kind.__signature__ = inspect.Signature([*own, *keywords])  # type: ignore[attr-defined]
    lines = [
        textwrap.fill(
            f"{name}: {' '.join((field.description or '').split())}",
            100,
            initial_indent=" " * 4,
            subsequent_indent=" " * 8,
        )
        for name, field in fields.items()
    ]
    # From Python 3.13 on the compiler strips the indentation.
    text = inspect.cleandoc(kind.__doc__ or "")
    kind.__doc__ = text.replace("    **options:", "\n".join(lines), 1)
    return kind
